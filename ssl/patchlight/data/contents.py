"""Whether files still hold what they held: sizes and times of a fixed sample of them, which are looked at, not read."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .random_numbers import CONTENTS, random_bits

MOST_FILES = 4096  # looked at: enough to find a change of one file in a thousand, with a probability of 98 %

_CODE = np.dtype("<u2")  # stands for a size or a time: it seldom stays the same when that changes


@dataclass(frozen=True)
class Contents:
    """Codes of the sizes and times of some files."""

    numbers: np.ndarray  # [n] int64, of the files
    sizes: np.ndarray  # [n] codes
    times: np.ndarray  # [n] codes

    def state(self) -> dict[str, str]:
        """For a checkpoint."""
        return {"sizes": _text(self.sizes), "times": _text(self.times)}


def look_at(files: Sequence[Path]) -> Contents:
    """The sizes and times of files, of a sample if there are many."""
    numbers = np.arange(len(files))
    if len(files) > MOST_FILES:
        numbers = np.unique(random_bits(CONTENTS, np.arange(MOST_FILES)) % np.uint64(len(files))).astype(np.int64)
    found = np.array([_size_and_time(files[number]) for number in numbers.tolist()], np.int64).reshape(-1, 2)
    codes = (random_bits(CONTENTS, found) & np.uint64(0xFFFF)).astype(_CODE)
    return Contents(numbers, codes[:, 0], codes[:, 1])


def describe_changes(before: dict[str, str], now: Contents, files: Sequence[Path]) -> str:
    """What has changed since a state, in words; empty if nothing has."""
    sizes, times = (np.frombuffer(base64.b64decode(before[name]), _CODE) for name in ("sizes", "times"))
    if len(sizes) != len(now.sizes):
        return f"there are {len(now.sizes)} files to look at, where there were {len(sizes)}"
    resized = sizes != now.sizes
    touched = ~resized & (times != now.times)
    if not (resized | touched).any():
        return ""
    example = files[int(now.numbers[np.flatnonzero(resized if resized.any() else touched)[0]])]
    return (
        f"of {len(sizes)} files that were looked at, {resized.sum()} have another size and {touched.sum()} the same size"
        f" but another time, such as {example}"
    )


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # it is gone; reading it will say so
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _text(codes: np.ndarray) -> str:
    return base64.b64encode(codes.tobytes()).decode()
