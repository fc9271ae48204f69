"""What a run's folder says about one of its checkpoints. Nothing is made up: what is not there stays empty."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..report.log_file import number, read_lines
from ..report.run_folder import (
    ENVIRONMENT_FILE,
    EVALUATION_FOLDER,
    KNN_FILE,
    METRICS_FILE,
    PICTURES_FOLDER,
    read_json,
)
from .files import last_part

RESULT_KEYS = {"task": str, "data": str, "checkpoint": str, "changed": dict, "metrics": dict}


@dataclass(frozen=True)
class RunFacts:
    """A checkpoint of a run, and the files around it."""

    folder: Path | None  # None for a checkpoint that was taken out of its run's folder
    step: Path
    facts: Mapping[str, Any]
    said: list[str] = field(default_factory=list)  # about files that cannot be used

    @property
    def run(self) -> dict[str, Any]:
        return self.facts["run"]

    @property
    def clock(self) -> dict[str, Any]:
        return self.facts["clock"]

    def shareable_run(self) -> dict[str, Any]:
        """The run's settings with the last part of every path alone, which names no folder of this machine."""
        return _without_paths(self.run)

    @cached_property
    def environment(self) -> dict[str, Any]:
        return self._read(self.folder / ENVIRONMENT_FILE) if self.folder else {}

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except ValueError as error:
            self.said.append(f"{path.name} cannot be read ({error}): the card leaves it out.")
            return {}

    def _lines(self, name: str) -> list[dict]:
        """The lines of a log file up to this checkpoint."""
        lines = read_lines(self.folder / name) if self.folder else []
        return [line for line in lines if line["step"] <= self.clock["step"]]

    @cached_property
    def looks(self) -> list[dict]:
        """The k-NN accuracies that the run measured itself: step, and a share of 1 for each number of neighbors."""
        return [{n: v for n, v in line.items() if number(v) is not None} for line in self._lines(KNN_FILE)]

    @cached_property
    def time(self) -> tuple[float, int] | None:
        """Seconds of training, and the step at which they were counted; None where no log line has them."""
        timed = [line for line in self._lines(METRICS_FILE) if number(line.get("seconds")) is not None]
        return (timed[-1]["seconds"], timed[-1]["step"]) if timed else None

    @cached_property
    def _found(self) -> list[tuple[Path, dict]]:
        files = sorted((self.folder / EVALUATION_FOLDER).glob("*.json")) if self.folder else []
        found = [(path, self._read(path)) for path in files]
        return [(p, r) for p, r in found if all(isinstance(r.get(n), kind) for n, kind in RESULT_KEYS.items())]

    @cached_property
    def results(self) -> list[dict]:
        """What `patchlight evaluate` has measured of this checkpoint."""
        return [result for _, result in self._found if _step_in(result["checkpoint"]) == self.clock["step"]]

    def left_out(self) -> list[str]:
        """Sentences about results that are of other checkpoints, and about files that cannot be read."""
        others = [path.name for path, result in self._found if result not in self.results]
        return [*self.said, *(f"{name} is of another checkpoint: the card leaves it out." for name in others)]

    def picture(self) -> Path | None:
        """The latest picture of attention up to this checkpoint; else that of the crops, if there is one."""
        folder = self.folder / PICTURES_FOLDER if self.folder else None
        if folder is None or not folder.is_dir():
            return None
        for kind in ("attention", "crops"):
            drawn = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(rf"{kind}-(\d+)\.png", p.name))}
            steps = [step for step in drawn if step <= self.clock["step"]]
            if steps:
                return drawn[max(steps)]
        return None


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return last_part(value) if isinstance(value, str) and re.search(r"[\\/]", value) else value


def _step_in(checkpoint: str) -> int | None:
    """The step that the path of a checkpoint names."""
    found = re.findall(r"step-(\d{8,})", checkpoint)
    return int(found[-1]) if found else None
