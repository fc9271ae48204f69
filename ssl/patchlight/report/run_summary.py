"""What the report shows of a run's log files, in bounded memory: each look reads only what is new."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from .log_file import number, parse
from .run_folder import BEST_FILE, DIAGNOSES_FILE, KNN_FILE, METRICS_FILE, read_json
from .series import Series

MOST_RECENT = 20
_LINES_PER_PAUSE = 500
_MOST_SERIES = 200  # names of numbers in one file
_NOT_DRAWN = frozenset(("step", "total", "epoch", "images", "seconds"))  # they count


class LogSummary:
    """The first, last and some recent lines of a file of JSON lines, and a series of each number in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start()

    def _start(self) -> None:
        self.file: tuple[int, int] | None = None  # device and inode
        self.read = 0  # bytes
        self.lines = self.damaged = 0
        self.problem = ""  # why the file cannot be read
        self.first: dict = {}
        self.last: dict = {}
        self.recent: deque[dict] = deque(maxlen=MOST_RECENT)
        self.series: dict[str, Series] = {}

    def update(self, pause: Callable[[], object]) -> None:
        """Reads the lines that were added. An unfinished last line is left for the next look."""
        self.problem = ""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if self.file != (facts.st_dev, facts.st_ino) or facts.st_size < self.read:
                    self._start()  # another file, or shorter than it was
                    self.file = facts.st_dev, facts.st_ino
                file.seek(self.read)
                for count, raw in enumerate(file, start=1):
                    if not raw.endswith(b"\n"):
                        break
                    self.read += len(raw)
                    self._take(parse(raw, "step"))
                    if count % _LINES_PER_PAUSE == 0:
                        pause()
        except FileNotFoundError:
            self._start()
        except OSError as error:
            self.problem = f"{self.path.name} cannot be read: {error.strerror}"

    def _take(self, line: dict | None) -> None:
        if line is None:
            self.damaged += 1
            return
        self.lines += 1
        self.first = self.first or line
        self.last = line
        self.recent.append(line)
        step = line["step"]
        for name, value in line.items():
            series = self.series.get(name)
            if series is None:
                if name in _NOT_DRAWN or isinstance(value, str | bool) or len(self.series) == _MOST_SERIES:
                    continue
                series = self.series[name] = Series()
            series.add(step, number(value))


class RunSummary:
    """The log files of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.metrics, self.knn, self.diagnoses = (
            LogSummary(self.folder / name) for name in (METRICS_FILE, KNN_FILE, DIAGNOSES_FILE)
        )

    def update(self, pause: Callable[[], object] = lambda: None) -> RunSummary:
        """Reads what was added to the files. pause: called now and then where that is much, so that other threads can go on."""
        for log in (self.metrics, self.knn, self.diagnoses):
            log.update(pause)
        return self

    def best(self) -> tuple[str, int, float] | None:
        """Name, step and value of the number whose best checkpoint is kept; None if the run keeps none."""
        try:
            found = read_json(self.folder / BEST_FILE)
        except (OSError, ValueError):
            return None
        name, step, value = found.get("name"), found.get("step"), number(found.get("value"))
        return (name, step, value) if isinstance(name, str) and type(step) is int and value is not None else None

    def problems(self) -> list[str]:
        """Sentences about lines and files that could not be used."""
        found = []
        for log in (self.metrics, self.knn, self.diagnoses):
            if log.problem:
                found.append(log.problem)
            if log.damaged:
                lines = f"{log.damaged:,} damaged lines" if log.damaged > 1 else "one damaged line"
                found.append(f"{log.path.name} has {lines}, left out here")
        for aside in sorted(self.folder.glob("*.damaged")):
            found.append(f"{aside.name} has damaged lines that were put aside")
        return found
