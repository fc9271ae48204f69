"""What `python -m bench cost` predicts for the steps that were measured, beside what was measured. It needs no GPU.

`python -m bench.gpu.predicted FOLDER` writes FOLDER/predicted.csv and predicted.md; with `--compiled` also for compiled steps,
which takes minutes for each.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from patchlight.usage import POSITIONAL, call

from ..cost.count import count_official, count_step
from ..cost.hardware import Hardware
from ..methods import LARGE, METHODS, OFFICIAL
from ..rows import CsvRow, Row, read_rows, write_rows
from .plan import COMPILED, LAUNCHED, OURS
from .results import table_lines

COLUMNS = (
    "case", "provider", "hardware", "launches", "launches predicted", "device_ms", "device_ms predicted", "ms", "images_per_s"
)  # fmt: skip
CASE = re.compile(r"(?P<title>.+) (?P<arch>\w+)/\d+ B(?P<batch>\d+) drop path (?P<drop_path>[\d.]+)")


def main(folder: Annotated[Path, POSITIONAL], compiled: bool = False) -> None:
    """Compare measured steps with their predictions.

    Args:
        folder: of results, with step_*.csv in it.
        compiled: also for compiled steps.
    """
    rows: list[Row] = []
    for measured in chosen_rows(folder, compiled):
        rows.append(compare(measured))
        write_rows(rows, folder / "predicted.csv", COLUMNS)
        (folder / "predicted.md").write_text("\n".join(page(rows)) + "\n")
        print(*(f"{name} {rows[-1][name]}" for name in COLUMNS[:-2]), flush=True)
    print(f"{len(rows)} steps compared")


def chosen_rows(folder: Path, compiled: bool) -> Iterator[CsvRow]:
    """The measured steps that can be counted: launched ones first, then official, then compiled ones if wanted."""
    rows = [row for path in sorted(folder.glob("step_*.csv")) for row in read_rows(path) if row["status"] == "ok"]
    for provider in (LAUNCHED, OFFICIAL, *((OURS, COMPILED) if compiled else ())):
        yield from (row for row in rows if row["provider"] == provider)


def compare(measured: CsvRow) -> Row:
    """A measured step with what is counted for it."""
    found = CASE.fullmatch(measured["case"])
    assert found, measured["case"]
    method = next(method for method in METHODS.values() if method.title == found["title"])
    size = replace(LARGE, arch=found["arch"], batch=int(found["batch"]), drop_path=float(found["drop_path"]))
    run = method.run(size)
    is_official = measured["provider"] == OFFICIAL
    launches = (
        count_official(method.official, run) if is_official else count_step(run, measured["provider"] != LAUNCHED)
    )
    constants = Hardware.load("h100" if "H100" in measured["hardware"] else "h200")
    return {
        "case": measured["case"],
        "provider": measured["provider"],
        "hardware": measured["hardware"],
        "launches": measured["launches"],
        "launches predicted": len(launches),
        "device_ms": measured["device_ms"],
        "device_ms predicted": f"{constants.device_ms(launch.kernel for launch in launches):.1f}",
        "ms": measured["median_ms"],
        "images_per_s": measured["images_per_s"],
    }


def page(rows: list[Row]) -> Iterator[str]:
    """The rows as a Markdown table, with how far each prediction is off."""
    yield "## Predicted by `python -m bench cost`, and measured"
    yield ""
    lines = [("step", "provider", "launches: predicted, measured", "device ms: predicted, measured")]
    for row in rows:
        pairs = (
            f"{row[f'{name} predicted']}, {float(row[name]):.4g} ({off(row[f'{name} predicted'], row[name])})"
            for name in ("launches", "device_ms")
        )
        lines.append((row["case"], row["provider"], *pairs))
    yield from table_lines(lines)


def off(predicted: str | int, measured: str) -> str:
    return f"{float(predicted) / float(measured) - 1:+.1%}"


if __name__ == "__main__":
    call(main, sys.argv[1:], "python -m bench.gpu.predicted")
