"""The committed table of what each method's step costs, and whether a step has become dearer than it says."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..methods import LARGE, METHODS
from ..rows import ROOT, CsvRow, Row, read_rows, write_rows
from .count import count_step
from .table import COUNTS, counts_by_phase

TABLE = ROOT / "bench/results/cost.csv"
UPDATE = "python -m bench cost --update-table"
CHECKED_DEPTH = 2  # blocks of the backbone: a test needs seconds, and sees the same operations
DEPTHS = (12, CHECKED_DEPTH)
COLUMNS = ("method", "depth", "phase", *COUNTS)
MARGINS = {"launches": 0.01, "gb": 0.01, "waits": 0.0}  # as shares of what the table says
SLACK = {"launches": 2, "gb": 0.005, "waits": 0}  # besides: a phase may be small


def rows_at(depth: int) -> list[Row]:
    """Every method's counts with so many blocks, at the size of the GPU measurements."""
    size = replace(LARGE, model_sizes={"depth": depth})
    counted = {name: counts_by_phase(count_step(method.run(size))) for name, method in METHODS.items()}
    return [
        {"method": name, "depth": depth, "phase": phase, **counts}
        for name, phases in counted.items()
        for phase, counts in phases.items()
    ]


def update_table(path: Path = TABLE) -> None:
    """Writes what the steps cost now."""
    write_rows([row for depth in DEPTHS for row in rows_at(depth)], path, COLUMNS)


def dearer(rows: Sequence[Row], table: Sequence[CsvRow]) -> Iterator[str]:
    """A sentence for each phase that needs more launches, bytes or waits of the host than the table says."""
    known = {(row["method"], row["depth"], row["phase"]): row for row in table}
    for row in rows:
        place = row["method"], str(row["depth"]), row["phase"]
        if place not in known:
            yield f"{row['method']}, {row['phase']}: not in {TABLE.name}; run `{UPDATE}` and commit the table."
            continue
        for name, margin in MARGINS.items():
            before, now = float(known[place][name]), float(row[name])
            if now > before * (1 + margin) + SLACK[name]:
                yield (
                    f"{row['method']}, {row['phase']}, {row['depth']} blocks: a step must not become dearer unseen, got "
                    f"{now:.5g} {name} where the table says {before:.5g}; make it cheaper, or if it is on purpose, run "
                    f"`{UPDATE}` and commit the table."
                )


def main() -> None:
    """For the test, in a process of its own: code may keep tensors of the fake GPU. Fails with the sentences."""
    sentences = list(dearer(rows_at(CHECKED_DEPTH), read_rows(TABLE)))
    print("\n".join(sentences))
    sys.exit(len(sentences) > 0)


if __name__ == "__main__":
    main()
