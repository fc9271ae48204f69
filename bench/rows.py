"""Rows of the CSV files: their columns, where their numbers come from, how they are written and read."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from patchlight_kernels.hardware import processor

Row = dict[str, Any]
CsvRow = dict[str, str]  # as it is read from a file

ROOT = Path(__file__).parent.parent
OURS = "patchlight"  # how the names of our providers begin
PROVENANCE = ("hardware", "threads", "torch", "triton", "commit", "date")  # in every row
TIMED = ("op", "case", "dtype", "device", "mode", "provider", "status", "median_ms", "p20_ms", "p80_ms", "rounds")
OP_COLUMNS = (
    *TIMED, "floor_ms", "percent_of_floor", "gb_per_s", "tflop_per_s", "peak_extra_mb", "error", *PROVENANCE
)  # fmt: skip


def provenance(device: str) -> Row:
    """Where a number comes from."""
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


@cache
def commit() -> str:
    """The commit, with a plus if files that matter differ from it."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name = git("rev-parse", "--short", "HEAD")
    return (name + "+" if git("status", "--porcelain", "csrc", "kernels", "ssl", "bench/*.py") else name) or "unknown"


def case_columns(op: str, case: str, dtype: str, device: str, mode: str) -> Row:
    """What all rows of a case share."""
    return {"op": op, "case": case, "dtype": dtype, "device": device, "mode": mode, **provenance(device)}


def write_rows(rows: Iterable[Row], path: Path, columns: Sequence[str] = OP_COLUMNS) -> None:
    """Writes the file anew, floats with five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def append_row(row: Row, path: Path, columns: Sequence[str]) -> None:
    """Adds a row as it is, after a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[CsvRow]:
    with path.open() as file:
        return list(csv.DictReader(file))


def median_ms(row: CsvRow) -> float:
    return float(row["median_ms"])


def by_case(rows: list[CsvRow]) -> dict[tuple[str, str, str, str], list[CsvRow]]:
    """The rows of each op, case, dtype and mode."""
    cases: dict[tuple[str, str, str, str], list[CsvRow]] = defaultdict(list)
    for row in rows:
        cases[row["op"], row["case"], row["dtype"], row["mode"]].append(row)
    return cases


def fastest_ours(rows: list[CsvRow]) -> CsvRow | None:
    """The fastest of our forms among timed rows of a case."""
    return min((row for row in rows if row["provider"].startswith(OURS)), key=median_ms, default=None)


def fastest_peer(rows: list[CsvRow]) -> CsvRow | None:
    """The fastest of the others; our reference is none of them."""
    return min(
        (row for row in rows if not row["provider"].startswith((OURS, "reference"))), key=median_ms, default=None
    )
