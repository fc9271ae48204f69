"""Reading the samples of a batch, with stand-ins for those that cannot be read: the same ones in every loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from .counter import SUBSTITUTE, counter_bits
from .stored import Source

MOST_SUBSTITUTES = 16  # so many unreadable samples in a row are no accident

REPORT_FILE = "bad_files.tsv"  # unreadable images, a line each: name, tab, why

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Replacement:
    """A sample that could not be read, and the one that stands in for it."""

    bad: int
    substitute: int
    reason: str


@dataclass(frozen=True, slots=True)
class Samples(Generic[T]):
    """What was read for a batch of ids."""

    contents: list[T]  # B of them
    ids: np.ndarray  # [B] int64, of what is shown
    replacements: list[Replacement]


def read_samples(source: Source, seed: int, ids: np.ndarray, read: Callable[[int], T]) -> Samples[T]:
    """Reads samples by number. What takes the place of an unreadable one depends on seed and id alone."""
    contents, shown, replacements = [], [], []
    for sample in ids.tolist():
        candidate, reason = sample, ""
        for attempt in range(MOST_SUBSTITUTES + 1):
            try:
                contents.append(read(candidate))
                break
            except Exception as error:  # decoders raise whatever they like on a damaged file
                reason = reason or why_unreadable(error)
            candidate = int(counter_bits(seed, SUBSTITUTE, sample, attempt)[0] % np.uint64(len(source)))
        else:
            raise OSError(
                f"One of {MOST_SUBSTITUTES} substitutes must be readable, got none for {source.name(sample)} ({reason});"
                " repair the data"
            )
        shown.append(candidate)
        if reason:
            replacements.append(Replacement(sample, candidate, reason))
    return Samples(contents, np.array(shown, dtype=np.int64), replacements)


def why_unreadable(error: Exception) -> str:
    """What a report says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
