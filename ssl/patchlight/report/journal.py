"""Writes the numbers of a run to files in its folder, the terminal, trackers, and the report made from the files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from ..records import Clock
from .console import Display, warn
from .entry import Entry, trackers_of
from .environment import write_environment
from .epochs import EpochMeans
from .event_file import EventFile
from .log_file import LogFile, number
from .outlet import Outlet
from .page_writer import PageWriter
from .run_folder import DIAGNOSES_FILE, ENVIRONMENT_FILE, EPOCHS_FILE, METRICS_FILE
from .wandb_tracker import WandbTracker


class Journal:
    """Writes log lines and warnings of one run. Only rank 0 has one. A file that cannot be written does not end the run."""

    def __init__(self, folder: str | Path, display: Display | None = None, track: Sequence[str] = ("auto",)) -> None:
        """track: as Output.track."""
        self.folder, self.display = Path(folder), display
        self.track = trackers_of(track)
        self.metrics, self.diagnoses = (LogFile(self.folder / n, self._say) for n in (METRICS_FILE, DIAGNOSES_FILE))
        self.epochs = LogFile(self.folder / EPOCHS_FILE, self._say, key="epoch")
        self.environment: Outlet[None] = Outlet(ENVIRONMENT_FILE, lambda _: write_environment(self.folder), self._say)
        self.trackers: list[Outlet[Entry] | WandbTracker] = []  # from the first entry on
        self.page = PageWriter(self.folder, self._say)
        self.opened = False

    def open(self, clock: Clock, start: int) -> float:
        """Before the first line of this process, which began at step `start`: puts damaged lines aside and removes later
        ones, which a resumed run writes again. Returns the seconds of training up to there."""
        self.opened = True
        self.means = EpochMeans(clock.steps_per_epoch)
        known: set[int] = set()
        missing: list[dict] = []
        seconds = 0.0

        def visit(line: dict) -> None:
            nonlocal seconds
            seconds = number(line.get("seconds")) or seconds
            missing.extend(mean for mean in self.means.add(line) if mean["epoch"] not in known)

        self.diagnoses.rewind(lambda line: line["step"] <= start)
        per_epoch = clock.steps_per_epoch
        self.epochs.rewind(lambda line: (line["epoch"] + 1) * per_epoch <= start, lambda line: known.add(line["epoch"]))
        self.means.go_to(next(epoch for epoch in count() if epoch not in known))
        self.metrics.rewind(lambda line: line["step"] <= start, visit)
        for mean in missing:
            self.epochs.add(mean)
        self.means.go_to(start // per_epoch)
        self.environment.put(None)
        self.begin_tracking(start)
        return seconds

    def begin_tracking(self, start: int) -> None:
        """Before the first entry for trackers of this process, which began at step `start`."""
        if "tensorboard" in self.track:
            write = EventFile(self.folder / "tensorboard", start).write
            self.trackers.append(Outlet("tensorboard", write, self._say, most=1000))  # each attempt encodes all of them
        if "wandb" in self.track:
            self.trackers.append(WandbTracker(self.folder, self._say))
        self.track = []

    def look(self, clock: Clock, start: int, numbers: Mapping[str, float], pictures: Mapping[str, bytes]) -> None:
        """Hands a look at the teacher to the trackers; its own files have it already. start: as for `open`."""
        self.begin_tracking(start)
        self._give(Entry(time.time(), clock.step, {f"knn/{name}": value for name, value in numbers.items()}, pictures))

    def _give(self, entry: Entry) -> None:
        for tracker in self.trackers:
            tracker.put(entry)

    def write(self, clock: Clock, record: Mapping[str, float]) -> None:
        """Writes a log line."""
        for outlet in (self.environment, self.epochs.outlet, self.diagnoses.outlet):  # they seldom have something new
            outlet.flush()
        self.metrics.add(record)
        for mean in self.means.add(record):
            self.epochs.add(mean)
        self._give(Entry(time.time(), clock.step, record))
        if self.display:
            self.display.update(record)
        self.page.request()

    def warn(self, clock: Clock, name: str, sentence: str, fatal: bool) -> None:
        """Prints a diagnosis and adds it to the file of diagnoses. fatal: it ends the run."""
        self.diagnoses.add({"step": clock.step, "name": name, "sentence": sentence, "fatal": fatal})
        self._give(Entry(time.time(), clock.step, name=name, sentence=sentence))
        self._say(f"step {clock.step}: {name}: {sentence}")

    def close(self) -> None:
        """Ends the display, writes what could not be written before, and the page once more, if there was a log line."""
        if self.display:
            self.display.close()
        for outlet in (self.environment, self.metrics.outlet, self.epochs.outlet, self.diagnoses.outlet):
            outlet.close()
        if self.opened:
            self.page.close()
        for tracker in self.trackers:  # last, as W&B may take its time
            tracker.close()

    def _say(self, sentence: str) -> None:
        (self.display.warn if self.display else warn)(sentence)
