"""`python -m bench.gpu.publish FOLDER h200` turns a rented GPU's CSVs into those that `python -m bench readme` reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from patchlight.usage import POSITIONAL, call

from ..report import RESULTS
from ..rows import CsvRow, read_rows, write_rows

# By kind: the CSVs in the folder, in the order of their rows.
SOURCES = {
    "step": ("step_*.csv",),
    "ops": ("ops.csv", "race.csv", "ops_more.csv", "ops_compiled_peers.csv"),
    "update": ("update.csv",),
    "loader": ("loader.csv",),
}


def main(folder: Annotated[Path, POSITIONAL], name: Annotated[str, POSITIONAL], results: Path = RESULTS) -> None:
    """Write <kind>_<name>.csv for each kind that was measured.

    Args:
        folder: of results of `python -m bench gpu`.
        name: the GPU's, as h200.
        results: where to write.
    """
    for kind, patterns in SOURCES.items():
        found = [read_rows(path) for pattern in patterns for path in sorted(folder.glob(pattern))]
        if rows := [row for part in found for row in part]:
            path = results / f"{kind}_{name}.csv"
            write_rows(grouped(rows), path, tuple(rows[0]))
            print(f"{len(rows)} rows: {path}")


def grouped(rows: list[CsvRow]) -> list[CsvRow]:
    """Rows of one case together, the official mathematics first, as reports expect them."""
    case = lambda row: tuple(row.get(column, "") for column in ("op", "case", "dtype", "mode"))
    order = list(dict.fromkeys(map(case, rows)))
    return sorted(rows, key=lambda row: (order.index(case(row)), not row["provider"].startswith("official")))


if __name__ == "__main__":
    call(main, sys.argv[1:], "python -m bench.gpu.publish")
