"""Reading the samples of a batch, with substitutes for those that cannot be read: the same ones in every loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from ..checks import sentence
from .random_numbers import SUBSTITUTE, random_bits

MAX_SUBSTITUTES = 16  # so many unreadable samples in a row do not happen by chance

REPORT_FILE = "bad_files.tsv"  # unreadable images, a line each: name, tab, reason

TIMEOUT = 300.0  # seconds in which a reading worker must begin another image

_LOOK = 0.5  # seconds between two looks at whether a worker gets on

T = TypeVar("T")


class WrongItem(ValueError):
    """An item that is no image: a mistake in a data set of the user's own, no damage that a substitute makes good."""


class Named(Protocol):
    """Samples that have names."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The sample's name in messages."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """A sample that could not be read, and its substitute."""

    bad: int
    substitute: int
    reason: str


@dataclass(frozen=True, slots=True)
class Sample(Generic[T]):
    """What was read for an id."""

    content: T
    id: int  # of what was read: the substitute's, if there is one
    replacement: Replacement | None


def read_samples(source: Named, seed: int, ids: np.ndarray, read: Callable[[int], T]) -> Iterator[Sample[T]]:
    """Reads samples by number, one after the other, and keeps none."""
    for sample in ids.tolist():
        yield read_sample(source, seed, sample, read)


def read_sample(source: Named, seed: int, sample: int, read: Callable[[int], T]) -> Sample[T]:
    """Reads a sample, or a substitute, which depends on the seed and the unreadable sample alone."""
    candidate, reason = sample, ""
    for attempt in range(MAX_SUBSTITUTES + 1):
        try:
            content = read(candidate)
            return Sample(content, candidate, Replacement(sample, candidate, reason) if reason else None)
        except WrongItem:
            raise
        except Exception as error:  # a damaged file can raise any exception in a decoder
            reason = reason or describe_error(error)
        candidate = int(random_bits(seed, SUBSTITUTE, sample, attempt)[0] % np.uint64(len(source)))
    rule = f"One of {MAX_SUBSTITUTES} substitutes must be readable"
    raise OSError(sentence(rule, f"none for {source.name(sample)} ({reason})", "repair the data"))


def describe_error(error: Exception) -> str:
    """The error's type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def wait_while_moving(wait: Callable[[float], bool], moved: Callable[[], int], timeout: float) -> bool:
    """Waits until `wait` says that it is over; False if `moved` stays the same for `timeout` seconds.

    Time is counted in short waits: a machine that was suspended, or a process that was stopped, does not count as waiting.
    """
    still, before = 0.0, moved()
    while not wait(min(_LOOK, timeout)):
        now = moved()
        still = still + min(_LOOK, timeout) if now == before else 0.0
        before = now
        if still >= timeout:
            return False
    return True
