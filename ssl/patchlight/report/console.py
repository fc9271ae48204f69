"""The terminal: log lines and a progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

_failures: set[int | None] = set()  # causes that were said


def print_sentence(sentence: str, console: Console | None = None, style: str = "") -> None:
    """A sentence on one line, however narrow the terminal and however long the names in it: so that a log can be searched."""
    try:
        (console or Console()).print(Text(sentence, style=style), soft_wrap=True)
    except OSError as error:
        say_unprintable(error)


def warn(sentence: str, console: Console | None = None) -> None:
    """A sentence that somebody should read."""
    print_sentence(f"warning: {sentence}", console, style="bold yellow")


def say_unprintable(error: OSError) -> None:
    """The terminal is gone, or its output goes to a full disk: that is said where errors go, once, and ends nothing."""
    if error.errno not in _failures:
        _failures.add(error.errno)
        with contextlib.suppress(OSError):
            print(f"warning: Lines cannot be printed, got {error}; they are left out.", file=sys.stderr, flush=True)


def table_of_names(title: str, columns: Iterable[object], rows: Iterable[Iterable[object]]) -> Table:
    """A table that shows every text as it is: names may hold brackets, which rich takes for markup."""
    table = Table(title=Text(title, style="table.title"))
    for column in columns:
        table.add_column(Text(str(column)))
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


class Display:
    """Prints log lines. On a terminal a progress bar stays below them, redrawn only with each line."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress: Progress | None = None
        self.first: tuple[float, float] | None = None  # step and seconds at the first line, for the time that is left

    def update(self, record: Mapping[str, float]) -> None:
        """Prints a log line."""
        try:
            self._print(record)
        except OSError as error:
            say_unprintable(error)
            # The old console repeats what it could not print, and keeps it for ever.
            self.console, self.progress = Console(file=self.console.file), None

    def _print(self, record: Mapping[str, float]) -> None:
        left = self._left(record)
        if not self.console.is_terminal:
            self.console.print(plain_line(record, left), soft_wrap=True, highlight=False, markup=False, emoji=False)
            return
        progress = self.progress or self._start(record)
        progress.console.print(colored_line(record))
        progress.update(self.task, completed=record["step"], rate=rates(record), left=left)
        progress.refresh()

    def warn(self, sentence: str) -> None:
        """Prints a warning."""
        warn(sentence, self.progress.console if self.progress else self.console)

    def close(self) -> None:
        """Ends the bar, if there is one."""
        progress, self.progress = self.progress, None
        if progress is not None:
            try:
                progress.stop()
            except OSError as error:
                say_unprintable(error)

    def _start(self, record: Mapping[str, float]) -> Progress:
        columns = [
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("[green]{task.fields[rate]}"),
            TextColumn("[bold]{task.fields[left]} left"),
        ]
        self.progress = Progress(*columns, console=self.console, auto_refresh=False, expand=True)
        self.task = self.progress.add_task("", total=record["total"], rate="", left="")
        self.progress.start()
        atexit.register(self.close)  # an error must not leave the terminal without a cursor
        return self.progress

    def _left(self, record: Mapping[str, float]) -> str:
        """The time that is left at the mean speed of this process."""
        if self.first is None:
            self.first = (record["step"], record["seconds"])
            per_step = record.get("speed/seconds_per_step")
        else:
            step, seconds = self.first
            per_step = (record["seconds"] - seconds) / max(record["step"] - step, 1)
        if per_step is None:
            return "?"
        return str(timedelta(seconds=round(per_step * (record["total"] - record["step"]))))


def plain_line(record: Mapping[str, float], left: str) -> str:
    """A line in the format of DINO's logs."""
    fields = {"eta": left} | {name: f"{value:.4f}" for name, value in terms(record).items()}
    for name, label in (("lr", "lr"), ("gradient/norm", "grad norm")):
        if name in record:
            fields[label] = f"{record[name]:.4g}"
    if "speed/seconds_per_step" in record:
        fields["time"] = f"{record['speed/seconds_per_step']:.4f}"
        fields["data"] = f"{record['data/wait_seconds'] / record['steps']:.4f}"
    if "speed/images_per_second" in record:
        fields["images/s"] = f"{record['speed/images_per_second']:.1f}"
        fields["waiting"] = f"{record['data/wait_share']:.1%}"
    if "speed/mfu" in record:
        fields["mfu"] = f"{record['speed/mfu']:.1%}"
    fields["max mem"] = f"{record['memory/gib'] * 1024:.0f}"
    body = "  ".join(f"{name}: {value}" for name, value in fields.items())
    return f"Epoch: [{record['epoch']:.2f}]  [{record['step']}/{record['total']}]  {body}"


def colored_line(record: Mapping[str, float]) -> Text:
    """The same for a terminal: losses first, the ratio to ln K in color."""
    line = Text(f"{record['step']:>7}  ", style="dim")
    for name, value in terms(record).items():
        ratio = name.endswith("/ln_k")
        style = (
            "bold" if name == "loss" else "yellow" if ratio and abs(value - 1) < 1e-3 else "magenta" if ratio else ""
        )
        line.append(f"{name} ", style="dim").append(f"{value:.4f}  ", style=style)
    for name, label in (("lr", "lr"), ("gradient/norm", "grad")):
        if name in record:
            line.append(f"{label} ", style="dim").append(f"{record[name]:.3g}  ")
    return line


def terms(record: Mapping[str, float]) -> dict[str, float]:
    """The loss first, then its terms and their ratios to ln K."""
    names = [name for name in record if "/" in name and is_term(name)]
    return {name: record[name] for name in ["loss", *names] if isinstance(record.get(name), float)}


def is_term(name: str) -> bool:
    """Whether a value with a / in its name belongs to a loss term, not to the machine or the step."""
    return name.split("/")[0] not in ("data", "memory", "speed", "step", "gradient", "teacher")


def rates(record: Mapping[str, float]) -> str:
    """Speed, share of time waiting for data, MFU, memory."""
    parts = []
    if "speed/images_per_second" in record:
        parts.append(f"{record['speed/images_per_second']:.0f} images/s")
        parts.append(f"{record['data/wait_share']:.1%} waiting")
    if "speed/mfu" in record:
        parts.append(f"{record['speed/mfu']:.1%} MFU")
    parts.append(f"{record['memory/gib']:.2f} GiB")
    return ", ".join(parts)
