"""Bytes that a worker maps instead of being sent a copy, so that giving it a task never waits for it."""

from __future__ import annotations

import mmap
import os
import weakref
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np


class SharedBytes:
    """Memory that belongs to no file and ends with the last process that has it. Pickled, it is a size only."""

    values: np.ndarray  # [size] uint8

    def __init__(self, size: int) -> None:
        self.size = size
        self._descriptor = os.memfd_create("patchlight")
        self._close = weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, max(1, size))
        self._map(self._descriptor)

    def _map(self, descriptor: int) -> None:
        self.values = np.frombuffer(mmap.mmap(descriptor, max(1, self.size)), np.uint8)[: self.size]

    def send(self, connection: Connection, process: int) -> None:
        """Gives the memory to a process, after what has this size was sent."""
        send_handle(connection, self._descriptor, process)

    def receive(self, connection: Connection) -> None:
        """Takes the memory that follows."""
        descriptor = recv_handle(connection)
        self._map(descriptor)
        os.close(descriptor)

    def __getstate__(self) -> dict[str, int]:
        return {"size": self.size}
