"""Which implementation was the fastest on a GPU, where somebody has measured: the rows of measured.csv beside this file.

A row holds for one operation, direction, size class (a name that the op's `size` gives), dtype and architecture. Its times are
those of its `case` in its `file`. In a row for "both" directions they are forward + backward, each form with itself.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("measured.csv")
DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True, slots=True)
class Place:
    """What a row holds for."""

    op: str
    direction: str
    size: str
    dtype: torch.dtype
    architecture: str


@dataclass(frozen=True, slots=True)
class Win:
    """What was measured: the fastest implementation and the next one, in microseconds."""

    winner: str
    us: float
    runner_up: str
    runner_up_us: float
    case: str
    hardware: str
    date: str
    file: str

    def sentence(self, direction: str) -> str:
        """Both times of a row for this direction, and where they were measured."""
        both = " forward + backward" if direction == "both" else ""
        times = f"{_short(self.us)} us{both} against {self.runner_up}'s {_short(self.runner_up_us)}"
        return f"{times} ({self.hardware}, {self.date}, {self.case})"


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


@cache
def read() -> dict[Place, tuple[Win, ...]]:
    """All rows; several of one place are several cases of its size class, whose winner is the same."""
    found: dict[Place, tuple[Win, ...]] = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            dtype = getattr(torch, row.pop("dtype"))
            place = Place(row.pop("op"), row.pop("direction"), row.pop("size"), dtype, row.pop("architecture"))
            times = {name: float(row.pop(name)) for name in ("us", "runner_up_us")}
            found[place] = (*found.get(place, ()), Win(**row, **times))  # type: ignore[arg-type]
    return found


def find(place: Place) -> tuple[Win, str] | None:
    """What was measured there, and the direction of its row: its own, else "both"; None if nobody has measured."""
    for direction in (place.direction, "both"):
        if wins := read().get(replace(place, direction=direction)):
            return wins[0], direction
    return None
