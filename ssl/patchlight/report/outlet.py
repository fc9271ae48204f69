"""Writes that must not end a run: what fails is said once, kept in memory, and tried again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from ..checks import sentence

T = TypeVar("T")
MOST_WAITING = 10_000


class Outlet(Generic[T]):
    """A place that entries are written to, in order. Entries that cannot be written wait for the next attempt."""

    def __init__(
        self, name: str, write: Callable[[list[T]], None], say: Callable[[str], None], most: int = MOST_WAITING
    ) -> None:
        """write: writes all entries or raises. say: tells the user a sentence. most: how many entries may wait."""
        self.name, self.write, self.say, self.most = name, write, say, most
        self.waiting: deque[T] = deque()
        self.dropped = 0  # since the last successful write
        self.causes: set[tuple] = set()  # of failures since then

    def put(self, entry: T) -> None:
        """Writes an entry, after those that wait."""
        if len(self.waiting) == self.most:
            self.waiting.popleft()
            self.dropped += 1
            if self.dropped == 1:
                self.say(f"{self.most} entries of {self.name} wait to be written: from now on the oldest are dropped.")
        self.waiting.append(entry)
        self.flush()

    def flush(self) -> None:
        """Tries to write what waits."""
        entries = list(self.waiting)
        if not entries or not self.attempt(lambda: self.write(entries)):
            return
        self.waiting.clear()
        if self.causes:
            lost = f"; {self.dropped} were dropped" if self.dropped else ""
            self.say(f"{self.name} could be written again, with {len(entries)} entries that waited or are new{lost}.")
        self.causes.clear()
        self.dropped = 0

    def attempt(self, work: Callable[[], None]) -> bool:
        """Whether the work could be done. A failure is said, once per cause."""
        try:
            work()
        except Exception as error:  # whatever it is, the numbers of a run are not worth the run
            cause = type(error), getattr(error, "errno", None)
            if cause not in self.causes:
                self.causes.add(cause)
                what = f"{type(error).__name__}: {error}"
                remedy = "training goes on, and what could not be written is kept and tried again"
                self.say(sentence(f"A run must be able to write {self.name}", what, remedy))
            return False
        return True

    def close(self) -> None:
        """The last attempt."""
        self.flush()
        if lost := len(self.waiting) + self.dropped:
            entries = "one entry is" if lost == 1 else f"{lost} entries are"
            self.say(f"{self.name} could not be written until the end: {entries} lost.")
