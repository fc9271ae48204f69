"""How parts ended, in one line each, and the summary of them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..rows import OURS, CsvRow, read_rows
from .plan import Part

DONE, FAILED, STOPPED, LEFT_OUT, DROPPED = "done", "failed", "stopped", "left out", "dropped"
TRIED = (DONE, FAILED, STOPPED)
LENGTH = 160  # characters of a result
TRACEBACK = "Traceback (most recent call last):"
SHOWN = (
    "op", "case", "dtype", "mode", "provider", "status", "median_ms", "images_per_s", "mfu", "device_ms", "launches",
    "waits", "peak_gib", "ready_s", "floor_ms", "percent_of_floor", "peak_extra_mb", "error", "cpu_ms_per_image",
    "gpu_busy_percent", "rate", "unit",
)  # fmt: skip
OFFICIAL = "official"  # how the names of these providers begin


@dataclass
class Outcome:
    """How a part ended."""

    state: str
    seconds: float = 0.0
    result: str = ""


def result_of(part: Part, folder: Path, status: int | None, limit: float) -> tuple[str, str]:
    """State and result of a part that was run; its status is None if it did not end within the limit."""
    path = folder / part.rows
    rows = read_rows(path) if part.rows and path.exists() else []
    text = digest(rows) if rows else last_line(folder / f"{part.name}.txt", interrupted=status is None)
    if status == 0:
        return DONE, text
    reason = f"over its limit of {limit:.0f} s" if status is None else f"status {status}"
    if status is not None and rows:  # rows do not say why it failed
        text = f"{last_line(folder / f'{part.name}.txt')}; {text}"
    return FAILED, f"{reason}: {text}"[:LENGTH]


def last_line(path: Path, interrupted: bool = False) -> str:
    """Of an interrupted part the one before the traceback."""
    lines = [line.strip(" =!") for line in path.read_text(errors="replace").splitlines()]
    if interrupted and TRACEBACK in lines:
        lines = lines[: lines.index(TRACEBACK)]
    return next((line for line in reversed(lines) if line), "no output")[:LENGTH]


def digest(rows: Sequence[CsvRow]) -> str:
    """The main numbers of a CSV in a line."""
    bad = Counter(row["status"] for row in rows if row.get("status", "ok") != "ok")
    timed = [row for row in rows if row.get("status", "ok") == "ok"]
    if rows[0].get("op") not in (None, "", "step"):
        parts = list(op_results(timed))
    elif "images_per_s" in rows[0]:
        parts = [f"{row['provider']} {float(row['images_per_s']):.0f} images/s" for row in timed]
    else:
        parts = [f"{row['case']} {row['rate']} {row['unit']}" for row in timed if "rate" in row] or [
            f"{len(rows)} rows"
        ]
    failures = [f"{number} rows {status}" for status, number in bad.items()]
    return "; ".join([*parts, *failures])[:LENGTH]


def op_results(rows: Iterable[CsvRow]) -> Iterator[str]:
    """For each case and mode the fastest of ours, and how many times as long the best of the others takes."""
    cases: dict[tuple[str, str, str, str], list[CsvRow]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"], row["dtype"], row["mode"]), []).append(row)
    milliseconds = lambda row: float(row["median_ms"])
    for (op, case, _, mode), found in cases.items():
        ours = min((row for row in found if row["provider"].startswith(OURS)), key=milliseconds, default=None)
        other = min((row for row in found if not row["provider"].startswith(OURS)), key=milliseconds, default=None)
        if ours is None:
            continue
        ratio = f" ({milliseconds(other) / milliseconds(ours):.2g}x {other['provider']})" if other else ""
        yield f"{op} {case} {mode} {milliseconds(ours) * 1e3:.4g} us {ours['provider']}{ratio}"


def markdown(parts: Sequence[tuple[Part, Outcome | None]], folder: Path) -> str:
    """The summary: a line for each part, why parts failed, what each CSV says, and predictions if they were made."""
    lines = ["# What ran", "", *parts_table(parts), ""]
    for part, outcome in parts:
        if outcome and outcome.state == FAILED:
            lines += [f"## {part.name} failed", "", "```", *why(folder / f"{part.name}.txt"), "```", ""]
    for part, _ in parts:
        path = folder / part.rows
        if part.rows and path.exists() and (rows := read_rows(path)):
            lines += [f"## {part.name}", "", where_from(rows[0]), "", *rows_table(rows), ""]
    predicted = folder / "predicted.md"
    return "\n".join(lines) + (predicted.read_text() if predicted.exists() else "")


def why(output: Path) -> list[str]:
    """The tests that failed, or the end of the output."""
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    tests = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return [line[:240] for line in (tests or lines)[-12:]]


def parts_table(parts: Sequence[tuple[Part, Outcome | None]]) -> Iterator[str]:
    yield from table_lines([
        ("part", "state", "seconds", "result"),
        *(
            (part.name, found.state, f"{found.seconds:.0f}", found.result) if found else (part.name, "not run", "", "")
            for part, found in parts
        ),
    ])  # fmt: skip


def rows_table(rows: Sequence[CsvRow]) -> Iterator[str]:
    """The columns that the rows have something in."""
    columns = [name for name in SHOWN if any(row.get(name) for row in rows)]
    yield from table_lines([columns, *([row.get(name) or "" for name in columns] for row in rows)])


def table_lines(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; the first line is its head."""
    cells = lambda line: "| " + " | ".join(text.replace("|", "/") for text in line) + " |"
    yield cells(lines[0])
    yield cells(["---"] * len(lines[0]))
    yield from map(cells, lines[1:])


def where_from(row: CsvRow) -> str:
    return ", ".join(
        f"{name} {row[name]}" for name in ("hardware", "torch", "triton", "commit", "date") if row.get(name)
    )
