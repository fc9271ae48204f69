"""What an evaluation leaves behind: a JSON file with the numbers and the whole protocol, and a table on the screen."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .checkpoints import home
from .encoder import Encoder
from .published import published

FOLDER = "evaluation"  # in a run's folder; the report reads it
_MOST_COLUMNS = 5


@dataclass(frozen=True)
class Result:
    """One evaluation of one checkpoint."""

    task: str
    data: str  # the benchmark it is, or a path
    checkpoint: str
    protocol: dict
    changed: dict  # what differs from the published protocol: [published, used]; the numbers compare only if empty
    metrics: dict[str, float]  # shares of 1
    notes: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)  # parts that could not be done, and why
    details: dict = field(default_factory=dict)


def judged(encoder: Encoder, task: str, data: str, protocol: object, metrics: dict[str, float], **more) -> Result:
    """A result under a protocol, a dataclass whose defaults are the published one."""
    notes = (*encoder.notes, *more.pop("notes", ()))
    return Result(task, data, encoder.name, asdict(protocol), changes(protocol), metrics, notes, **more)


def changes(protocol: object) -> dict:
    """Fields that differ from the published protocol: the published value and the one used."""
    used, frozen = asdict(protocol), asdict(type(protocol)())
    return {name: [frozen[name], used[name]] for name in used if used[name] != frozen[name]}


def results_folder(checkpoint: str) -> Path:
    """Where results of a checkpoint belong: in its run's folder, beside its file, or here for a timm model."""
    path = Path(checkpoint)
    if run := home(checkpoint) if path.exists() else None:
        return run / FOLDER
    if path.exists():
        return path.parent / f"{path.stem}-{FOLDER}"
    return Path(FOLDER) / re.sub(r"[^\w.-]+", "-", checkpoint)


def save_result(result: Result, folder: Path, environment: dict) -> Path:
    """Writes <task>-<data>.json at once, so that a reader never sees half of it."""
    name = re.sub(r"[^\w.%-]+", "-", f"{result.task}-{Path(result.data).name or 'data'}")
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in published(result.task, result.data)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**asdict(result), "published": rows, "environment": environment}, indent=1))
    temporary.replace(path)
    return path


def show_result(result: Result, console: Console | None = None) -> None:
    """The measured numbers in percent, the published ones below, and whether they may be compared."""
    console = console or Console()
    rows = published(result.task, result.data)
    known = [name for name in result.metrics if any(name in row.metrics for row in rows)]
    names = known or list(result.metrics)[:_MOST_COLUMNS]
    table = Table(title=f"{result.task} on {result.data}")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    table.add_row("[bold]measured[/bold]", *(f"[bold]{100 * result.metrics[name]:.2f}[/bold]" for name in names))
    for row in rows:
        epochs = f", {row.epochs} epochs" if row.epochs else ""
        values = (f"{row.metrics[name]:.1f}" if name in row.metrics else "" for name in names)
        table.add_row(f"{row.method}, {row.backbone}{epochs} ({row.source})", *values)
    console.print(table)
    rest = ", ".join(f"{name} {100 * value:.2f}" for name, value in result.metrics.items() if name not in names)
    lines = [Text(f"also: {rest}")] if rest else []
    if not rows:
        lines.append(Text(f"No published number is known for {result.task} on {result.data}."))
    elif result.changed:
        text = ", ".join(f"{name} {used} instead of {frozen}" for name, (frozen, used) in result.changed.items())
        lines.append(Text.assemble(("Not comparable with the published numbers: ", "yellow"), text))
    lines += [Text(f"note: {note}") for note in result.notes]
    lines += [Text(f"failed: {part}: {reason}", "bold red") for part, reason in result.failed.items()]
    for line in lines:
        console.print(line, soft_wrap=True)  # a sentence stays on one line, so that a log can be searched
