"""Processes that read batches ahead. One that dies or stands still is started anew and reads the same batches again.

torch's DataLoader waits for a stopped process without end, reports a dead one by an exception anywhere in the training, and
knows of neither what it was reading. Here each process has a pipe of its own and writes batches into memory that is shared
from the start, so that whatever happens to it is seen where its batch is awaited, and nowhere else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import sentence
from ..process import end_with_parent
from .reading import Replacement, describe_error, wait_while_moving
from .shared_bytes import SharedBytes

MOST_STARTS = 4  # of a worker for the same batch

_SLOTS = 2  # batches that a worker reads ahead

Task = Any  # what a batch is read from: picklable; its `memory`, if it has SharedBytes of this name, is not copied


class ReadsBatches(Protocol):
    """What runs in the workers. It must depend on the task alone."""

    def blank(self) -> dict[str, Tensor]:
        """The tensors of a batch, with any values."""

    def read(self, task: Task, into: dict[str, Tensor], begin: Callable[[int], None]) -> list[Replacement]:
        """Reads a batch into its tensors; calls `begin` with the number of each image before it is read."""

    def name(self, image: int) -> str:
        """An image's name in messages."""


@dataclass
class _Worker:
    number: int
    slots: list[dict[str, Tensor]]  # shared
    progress: Tensor  # shared, int64: how many images were begun, and the last one's number
    waiting: deque[tuple[int, Task]] = field(default_factory=deque)  # (slot, task), oldest first
    process: Any = None
    connection: Any = None

    def start(self, reads: ReadsBatches) -> None:
        self.progress[1] = -1
        self.connection, theirs = multiprocessing.Pipe()
        arguments = reads, self.slots, self.progress, theirs
        self.process = multiprocessing.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        for slot, task in self.waiting:
            self._send(slot, task)

    def give(self, slot: int, task: Task) -> None:
        self.waiting.append((slot, task))
        self._send(slot, task)

    def _send(self, slot: int, task: Task) -> None:
        with contextlib.suppress(OSError):  # it is dead, which is seen when its batch is awaited
            self.connection.send((slot, task))
            if isinstance(memory := getattr(task, "memory", None), SharedBytes):
                memory.send(self.connection, self.process.pid)

    def await_answer(self, timeout: float) -> tuple[Any, str]:
        """The answer to the oldest task; or None, and why there is none."""

        def wait(seconds: float) -> bool:
            return bool(multiprocessing.connection.wait([self.connection, self.process.sentinel], seconds))

        if not wait_while_moving(wait, lambda: int(self.progress[0]), timeout):
            return None, f"has not got on for {timeout:g} seconds"
        try:
            if self.connection.poll():
                return self.connection.recv(), ""
        except (EOFError, OSError):
            pass
        self.process.join()
        code = self.process.exitcode
        return None, f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"


class Workers:
    """Batches of tasks in their order, each read by one of `count` processes."""

    def __init__(
        self, loader: str, reads: ReadsBatches, tasks: Iterator[Task], count: int, timeout: float, pin_memory: bool
    ):
        """loader: its name in messages. timeout: seconds in which a worker must begin another image."""
        self.loader, self.reads, self.tasks, self.timeout, self.pin_memory = loader, reads, tasks, timeout, pin_memory
        self._workers = [
            _Worker(number, [_shared(reads.blank()) for _ in range(_SLOTS)], torch.zeros(2).long().share_memory_())
            for number in range(count)
        ]
        self._turn = 0  # whose batch is next
        self.close = Finalize(self, _end, (self._workers,), exitpriority=1)  # also when it is forgotten, or Python ends
        for worker in self._workers:
            worker.start(reads)
        for slot in range(_SLOTS):
            for worker in self._workers:
                worker.give(slot, next(tasks))

    def __next__(self) -> tuple[dict[str, Tensor], list[Replacement]]:
        worker = self._workers[self._turn]
        answer = self._answer(worker)
        slot, _ = worker.waiting.popleft()
        batch = {name: torch.empty_like(t, pin_memory=self.pin_memory) for name, t in worker.slots[slot].items()}
        for name, tensor in batch.items():
            tensor.copy_(worker.slots[slot][name])
        worker.give(slot, next(self.tasks))
        self._turn = (self._turn + 1) % len(self._workers)
        if isinstance(answer, Exception):
            raise answer
        return batch, answer

    def _answer(self, worker: _Worker) -> Any:
        """The answer to the worker's oldest task; starts it anew where that is needed."""
        for start in range(1, MOST_STARTS + 1):
            answer, problem = worker.await_answer(self.timeout)
            if not problem:
                return answer
            image, process = int(worker.progress[1]), worker.process.pid
            place = f"at {self.reads.name(image)}" if image >= 0 else "before it began to read"
            problem = f"worker {worker.number} (process {process}) {problem} {place}"
            _end([worker])
            if start < MOST_STARTS:
                warnings.warn(f"{self.loader} loader: {problem}; it is started anew and reads the same batch again")
                worker.start(self.reads)
        raise RuntimeError(
            sentence(
                f"{self.loader} loader: a worker must be able to read its batch in {MOST_STARTS} attempts",
                f"the last one: {problem}",
                "look at that file and its file system; look with dmesg and df /dev/shm whether memory was short, then use"
                " fewer workers; if the file system is only slow, allow more time (in a training: Data.timeout)",
            )
        )


def _shared(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.share_memory_() for name, tensor in batch.items()}


def _end(workers: list[_Worker]) -> None:
    """Ends processes, also such as are stopped."""
    for worker in workers:
        if worker.process is not None and worker.process.is_alive():
            worker.process.kill()
    for worker in workers:
        if worker.process is not None:
            worker.process.join(10)  # one that waits for a file system ends later, and writes nothing more
            worker.connection.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _work(reads: ReadsBatches, slots: list[dict[str, Tensor]], progress: Tensor, connection: Any) -> None:
    """A worker process: answers tasks until the training process is gone."""
    for request in (signal.SIGINT, signal.SIGTERM):  # for the training process, which ends its workers
        signal.signal(request, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    torch.set_num_threads(1)

    def begin(image: int) -> None:
        progress[1] = image
        progress[0] += 1

    while True:
        try:
            slot, task = connection.recv()
            if isinstance(memory := getattr(task, "memory", None), SharedBytes):
                memory.receive(connection)
        except EOFError:
            return
        answer: Any
        try:
            answer = reads.read(task, slots[slot], begin)
        except Exception as error:
            answer = sendable(error)
        connection.send(answer)


def sendable(error: Exception) -> Exception:
    """The error, or one with its text if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a library, with other arguments than its message
        return RuntimeError(describe_error(error))
    return error
