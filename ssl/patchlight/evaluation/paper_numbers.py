"""Numbers that papers give for these protocols, printed beside the measured ones. They are in paper_numbers.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class PaperNumbers:
    """One row of a paper's table."""

    task: str
    data: str
    method: str
    backbone: str
    epochs: int | None  # of pretraining; None where the source does not state them
    metrics: dict[str, float]  # percent
    source: str


@cache
def all_paper_numbers() -> tuple[PaperNumbers, ...]:
    """Every row of the file."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["table"]
    return tuple(
        PaperNumbers(
            table["task"],
            table["data"],
            method,
            backbone,
            epochs or None,
            dict(zip(table["metrics"], values, strict=True)),
            table["source"],
        )
        for table in tables
        for method, backbone, epochs, *values in table["rows"]
    )


def paper_numbers(task: str, data: str) -> list[PaperNumbers]:
    """The rows of a task on a data set."""
    return [row for row in all_paper_numbers() if (row.task, row.data) == (task, data)]
