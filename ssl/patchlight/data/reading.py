"""Reading the samples of a batch, with substitutes for those that cannot be read: the same ones in every loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ..checks import sentence
from .random_numbers import SUBSTITUTE, random_bits
from .stored import Source

MAX_SUBSTITUTES = 16  # so many unreadable samples in a row do not happen by chance

REPORT_FILE = "bad_files.tsv"  # unreadable images, a line each: name, tab, reason

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Replacement:
    """A sample that could not be read, and its substitute."""

    bad: int
    substitute: int
    reason: str


@dataclass(frozen=True, slots=True)
class Samples(Generic[T]):
    """What was read for a batch of ids."""

    contents: list[T]  # B of them
    ids: np.ndarray  # [B] int64, of the samples read, substitutes included
    replacements: list[Replacement]


def read_samples(source: Source, seed: int, ids: np.ndarray, read: Callable[[int], T]) -> Samples[T]:
    """Reads samples by number. The substitute of an unreadable sample depends on seed and id alone."""
    contents: list[T] = []
    ids_read: list[int] = []
    replacements: list[Replacement] = []
    for sample in ids.tolist():
        candidate, reason = sample, ""
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                contents.append(read(candidate))
                break
            except Exception as error:  # a damaged file can raise any exception in a decoder
                reason = reason or describe_error(error)
            candidate = int(random_bits(seed, SUBSTITUTE, sample, attempt)[0] % np.uint64(len(source)))
        else:
            rule = f"One of {MAX_SUBSTITUTES} substitutes must be readable"
            raise OSError(sentence(rule, f"none for {source.name(sample)} ({reason})", "repair the data"))
        ids_read.append(candidate)
        if reason:
            replacements.append(Replacement(sample, candidate, reason))
    return Samples(contents, np.array(ids_read, dtype=np.int64), replacements)


def describe_error(error: Exception) -> str:
    """The error's type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
