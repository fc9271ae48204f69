"""Writes the numbers of a run to files in its folder, the terminal, TensorBoard, and the report made from the files."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import Clock
from .console import Display, is_term
from .environment import write_environment
from .page import write_report
from .run_folder import DIAGNOSES_FILE, EPOCHS_FILE, METRICS_FILE, append_line, read_lines, rewind

PAGE_SECONDS = 20  # between two writes of the page, which take at most a hundredth of the time


class Journal:
    """Writes log lines and warnings of one run. Only rank 0 has one."""

    def __init__(self, folder: str | Path, display: Display | None = None, tensorboard: bool | None = None) -> None:
        """tensorboard: None writes it where it is installed."""
        self.folder, self.display = Path(folder), display
        found = importlib.util.find_spec("tensorboard") is not None
        self.tensorboard = found if tensorboard is None else tensorboard
        self.writer: Any = None
        self.next_page = 0.0

    def open(self, clock: Clock, start: int) -> float:
        """Before the first line of this process, which began at step `start`: removes later lines, which a resumed run
        writes again. Returns the seconds of training up to there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = rewind(self.folder / METRICS_FILE, lambda line: line["step"] <= start)
        rewind(self.folder / DIAGNOSES_FILE, lambda line: line["step"] <= start)
        rewind(self.folder / EPOCHS_FILE, lambda line: (line["epoch"] + 1) * clock.steps_per_epoch <= start)
        write_environment(self.folder)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        return kept[-1]["seconds"] if kept else 0.0

    def write(self, clock: Clock, record: Mapping[str, float]) -> None:
        """Writes a log line."""
        append_line(self.folder / METRICS_FILE, record)
        self._write_epochs(clock)
        if self.writer:
            for name, value in record.items():
                self.writer.add_scalar(name, value, clock.step)
        if self.display:
            self.display.update(record)
        self._write_page(force=False)

    def warn(self, clock: Clock, name: str, sentence: str, fatal: bool) -> None:
        """Prints a diagnosis and adds it to the file of diagnoses. fatal: it ends the run."""
        record = {"step": clock.step, "name": name, "sentence": sentence, "fatal": fatal}
        append_line(self.folder / DIAGNOSES_FILE, record)
        if self.display:
            self.display.warn(f"step {clock.step}: {name}: {sentence}")

    def close(self) -> None:
        """Ends the display and writes the page once more, if there was a log line."""
        if self.display:
            self.display.close()
        if self.writer:
            self.writer.close()
        if (self.folder / METRICS_FILE).exists():
            self._write_page(force=True)

    def _write_epochs(self, clock: Clock) -> None:
        """A line in log.txt for each epoch that is over. A log line belongs to the epoch of its last step."""
        path = self.folder / EPOCHS_FILE
        done = len(read_lines(path))
        if done >= clock.step // clock.steps_per_epoch:
            return
        lines = read_lines(self.folder / METRICS_FILE)
        for epoch in range(done, clock.step // clock.steps_per_epoch):
            first, last = epoch * clock.steps_per_epoch, (epoch + 1) * clock.steps_per_epoch
            inside = [line for line in lines if first < line["step"] <= last]
            inside = inside or [next(line for line in lines if line["step"] > first)]
            append_line(path, epoch_line(epoch, inside))

    def _write_page(self, force: bool) -> None:
        now = time.perf_counter()
        if force or now >= self.next_page:
            write_report(self.folder)
            took = time.perf_counter() - now
            self.next_page = now + max(PAGE_SECONDS, 100 * took)


def epoch_line(epoch: int, lines: list[dict]) -> dict[str, float]:
    """DINO's line of an epoch: means over its log lines under train_ names; rates as of its end."""
    steps = sum(line["steps"] for line in lines)
    names = {"loss": "train_loss", "lr": "train_lr", "weight_decay": "train_wd"}
    names |= {name: f"train_{name}" for name in lines[-1] if name.count("/") == 1 and is_term(name)}
    record: dict[str, float] = {}
    for name, written in names.items():
        values = [(line["steps"], line[name]) for line in lines if name in line]
        if values:
            record[written] = sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)
    return record | {"epoch": epoch, "steps": steps}
