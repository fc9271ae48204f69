"""The output of an evaluation: a JSON file with the numbers and the whole protocol, and a table on the screen."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .checkpoints import run_folder_of
from .encoder import Encoder
from .paper_numbers import PaperNumbers, main_numbers, paper_numbers

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FOLDER = "evaluation"  # in a run's folder, where the run's report finds it
_MOST_COLUMNS, _MOST_ROWS = 5, 10


@dataclass(frozen=True)
class Result:
    """One evaluation of one checkpoint."""

    task: str
    data: str  # the name of the benchmark, or a path
    checkpoint: str
    protocol: dict
    changed: dict  # what differs from the published protocol: [published, used]; the numbers compare only if empty
    metrics: dict[str, float]  # shares of 1
    notes: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)  # parts that could not be done, and why
    details: dict = field(default_factory=dict)


def build_result(
    encoder: Encoder,
    task: str,
    data: str,
    protocol: DataclassInstance,
    metrics: dict[str, float],
    notes: tuple[str, ...] = (),
    failed: dict[str, str] | None = None,
    details: dict | None = None,
    *,
    published: DataclassInstance | None = None,
) -> Result:
    """A result under a protocol. published: the protocol as published for this data; by default the class's own defaults."""
    used, changed, notes = asdict(protocol), changed_fields(protocol, published), (*encoder.notes, *notes)
    return Result(task, data, encoder.name, used, changed, metrics, notes, failed or {}, details or {})


def changed_fields(protocol: DataclassInstance, published: DataclassInstance | None = None) -> dict:
    """Fields that differ from the published protocol, by default the class's own defaults: the published value and the used
    one."""
    used, usual = asdict(protocol), asdict(published or type(protocol)())
    return {name: [usual[name], used[name]] for name in used if used[name] != usual[name]}


def results_folder(checkpoint: str) -> Path:
    """Where results of a checkpoint belong: in its run's folder, beside its file, or in the current folder for a timm model."""
    path = Path(checkpoint)
    if run := run_folder_of(checkpoint):
        return run / FOLDER
    if path.exists():
        return path.parent / f"{path.stem}-{FOLDER}"
    return Path(FOLDER) / re.sub(r"[^\w.-]+", "-", checkpoint)


def save_result(result: Result, folder: Path, environment: dict) -> Path:
    """Writes <task>-<data>.json at once, so that a reader never finds half of it."""
    name = re.sub(r"[^\w.%-]+", "-", f"{result.task}-{Path(result.data).name or 'data'}")
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in paper_numbers(result.task, result.data)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**asdict(result), "published": rows, "environment": environment}, indent=1))
    temporary.replace(path)
    return path


def print_result(result: Result, console: Console | None = None) -> None:
    """The measured numbers in percent, the published ones below, and whether they may be compared."""
    console = console or Console()
    rows = main_numbers(result.task, result.data)
    in_papers = [name for name in result.metrics if any(name in row.metrics for row in rows)]
    names = in_papers or list(result.metrics)[:_MOST_COLUMNS]
    console.print(_table(result, names, rows[:_MOST_ROWS]))
    rest = ", ".join(f"{name} {100 * value:.2f}" for name, value in result.metrics.items() if name not in names)
    lines = [Text(f"also: {rest}")] if rest else []
    if more := len(paper_numbers(result.task, result.data)) - len(rows[:_MOST_ROWS]):
        lines.append(Text(f"{more} more rows of papers are in the result's file; `patchlight tables show` lists all."))
    if not rows:
        lines.append(Text(f"No published number is known for {result.task} on {result.data}."))
    elif result.changed:
        text = ", ".join(f"{name} {used} instead of {published}" for name, (published, used) in result.changed.items())
        lines.append(Text.assemble(("Not comparable with the published numbers: ", "yellow"), text))
    lines += [Text(f"note: {note}") for note in result.notes]
    lines += [Text(f"failed: {part}: {reason}", "bold red") for part, reason in result.failed.items()]
    for line in lines:
        console.print(line, soft_wrap=True)  # a sentence stays on one line, so that a log can be searched


def _table(result: Result, names: list[str], rows: list[PaperNumbers]) -> Table:
    table = Table(title=Text(f"{result.task} on {result.data}", style="table.title"))
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    table.add_row("[bold]measured[/bold]", *(f"[bold]{100 * result.metrics[name]:.2f}[/bold]" for name in names))
    for row in rows:
        epochs = f", {row.epochs} epochs" if row.epochs else ""
        values = (f"{row.metrics[name]:.1f}" if name in row.metrics else "" for name in names)
        table.add_row(f"{row.method}, {row.backbone}{epochs} ({row.source})", *values)
    return table
