"""This process beside others: one at a time writes into a folder, none outlives its launcher, and a signal is a request."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from .checks import sentence

LOCK_FILE = "run.lock"  # empty while nobody has the lock
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class FolderLock:
    """A lock on a folder that says who has it. The system ends it with the process, however that ends."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        self.other = ""  # who has it instead
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.other = self._written() or "an unknown process"
            return
        except OSError as error:
            say(
                f"{folder} is on a file system without locks ({error.strerror}): see that one run at a time writes into it."
            )
        before = self._written()
        if before:
            say(f"The run of {before} ended without a word; this one takes over {folder}.")
        self._write(
            f"process {os.getpid()} on {platform.node()}, started {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
        )

    def release(self) -> None:
        """Lets others have it."""
        if not self.other:
            self._write("")
        os.close(self.descriptor)

    def _written(self) -> str:
        return os.pread(self.descriptor, 1000, 0).decode(errors="replace").strip("\0\n")

    def _write(self, holder: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
            os.truncate(self.descriptor, 0)
            os.pwrite(self.descriptor, holder.encode(), 0)


def end_with_launcher() -> None:
    """Asks for SIGTERM when torchrun ends, so that no rank goes on unseen; an error if it has ended already."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent(signal.SIGTERM)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens there before it starts any rank
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            rule, got = "A rank needs the launcher that has started it", f"none at {address[0]}:{address[1]} ({error})"
            raise ConnectionError(sentence(rule, got, "start the run again")) from error


def end_with_parent(number: signal.Signals) -> None:
    """Asks Linux for a signal when the parent of this process ends, also when it is killed."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the request
        os.kill(os.getpid(), number)


class StopRequest:
    """Turns SIGTERM, the signal of schedulers and torchrun, and Ctrl-C into a flag that is read between steps.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.received = ""  # the signal's name

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.received == "Ctrl-C":
            raise KeyboardInterrupt
        self.received = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
