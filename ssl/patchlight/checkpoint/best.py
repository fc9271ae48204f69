"""Which checkpoint of a run is the best by a number: a small file that says so, and a link to the checkpoint."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..checks import sentence
from ..durable import move, sync_folder, write_whole
from .folder import name_of


@dataclass(frozen=True, slots=True)
class Best:
    """The best value of a number so far, and its step."""

    name: str
    value: float
    step: int


class BestMark:
    """best.json of a run, and the link `best` beside it. Only a checkpoint that is complete is marked."""

    def __init__(self, file: Path, checkpoints: Path) -> None:
        self.file, self.link, self.checkpoints = file, file.with_suffix(""), checkpoints
        self.best = self.marked = read_best(file)  # the marked checkpoint is written; the best one may be under way

    def improves(self, name: str, value: float) -> bool:
        """Whether a value is above the best one. Of equal values the earlier stays; one that is not finite never is."""
        return math.isfinite(value) and (self.best is None or self.best.name != name or value > self.best.value)

    def candidates(self, name: str, looks: Mapping[int, float], last: int) -> list[Best]:
        """The steps up to the last one that may be the best, the best first: those of the looks, and the one marked before."""
        values = {step: value for step, value in looks.items() if math.isfinite(value)}
        if self.marked is not None and self.marked.name == name:  # its look may be lost
            values.setdefault(self.marked.step, self.marked.value)
        found = [Best(name, value, step) for step, value in values.items() if 0 < step <= last]
        return sorted(found, key=lambda best: (-best.value, best.step))

    def mark(self, best: Best | None) -> None:
        """Marks a complete checkpoint, or none. A loss of power leaves the mark before or this one."""
        self.best = self.marked = best
        if best is None:
            self.link.unlink(missing_ok=True)
            self.file.unlink(missing_ok=True)
            return
        write_whole(self.file, json.dumps(asdict(best)))
        target = os.path.relpath(self.checkpoints / name_of(best.step), self.link.parent)
        temporary = self.link.with_name(f".{self.link.name}.{os.getpid()}")
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target, target_is_directory=True)
            move(temporary, self.link)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            remedy = f"the best checkpoint is {target}"
            warnings.warn(sentence(f"{self.link} should be a link to the best checkpoint", error, remedy))
        sync_folder(self.link.parent)


def read_best(file: Path) -> Best | None:
    """What best.json says; None if there is none, or a damaged one."""
    try:
        found = Best(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    number = isinstance(found.value, int | float) and math.isfinite(found.value)
    return found if number and type(found.step) is int and isinstance(found.name, str) else None
