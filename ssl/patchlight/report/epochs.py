"""The lines of log.txt: means over the log lines of each epoch, in the form of DINO."""

from __future__ import annotations

from collections.abc import Mapping

from .console import is_term
from .log_file import number

_NAMES = {"loss": "train_loss", "lr": "train_lr", "weight_decay": "train_wd"}


class EpochMeans:
    """Sums log lines until their epoch is over. A log line belongs to the epoch of its last step."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.epoch = 0  # the first that is not over
        self._clear()

    def add(self, line: Mapping) -> list[dict]:
        """Adds a log line; returns the lines of the epochs that are over with it. One without log lines has the next line's."""
        step, over = line["step"], []
        while self.epoch < step // self.steps_per_epoch:
            if step <= (self.epoch + 1) * self.steps_per_epoch or not self.steps:
                self._sum(line)
            over.append(self._mean())
            self.epoch += 1
            self._clear()
        if step > self.epoch * self.steps_per_epoch:
            self._sum(line)
        return over

    def go_to(self, epoch: int) -> None:
        """Leaves out earlier epochs that got no line, because their log lines are lost."""
        if self.epoch < epoch:
            self.epoch = epoch
            self._clear()

    def _clear(self) -> None:
        self.steps = 0.0
        self.sums: dict[str, tuple[float, float]] = {}  # weighted values, and the weights of the finite ones

    def _sum(self, line: Mapping) -> None:
        steps = number(line.get("steps")) or 1.0
        self.steps += steps
        for name, raw in line.items():
            loss_term = name.count("/") == 1 and is_term(name) and not name.endswith("/nonfinite")
            if name not in _NAMES and not loss_term:
                continue
            value, (total, weight) = number(raw), self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (total, weight) if value is None else (total + steps * value, weight + steps)

    def _mean(self) -> dict[str, float | None]:
        means: dict[str, float | None] = {
            _NAMES.get(name, f"train_{name}"): total / weight if weight else None
            for name, (total, weight) in self.sums.items()
        }
        steps = int(self.steps) if self.steps.is_integer() else self.steps
        return means | {"epoch": self.epoch, "steps": steps}
