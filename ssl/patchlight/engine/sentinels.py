"""Failures that a loss curve may not make visible, each reported by its name at a log line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..records import Clock
from .branches import Student, Teacher, check_teacher_student
from .dtensor import local
from .optim import Update
from .parallel import Mesh

PATIENCE = 10  # log lines in a row that a symptom must last
UNIFORM = 1e-3  # how near loss / ln K must be to 1
CONSTANT = 1e-3  # spread of the features, 1 for independent directions, below which they are constant
ABOVE = 1.5  # times ln K and its first value, which a loss of prototypes must not exceed
GROWN = 30  # times the norm of all weights at the start: far more than a run that learns needs; chosen, not measured
PIXELS = (0.05, 10.0)  # root mean square of normalized pixels, which is about 1


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong, by which numbers, and what to do; fatal ends the run."""

    name: str
    sentence: str
    fatal: bool = False


class TrainingError(RuntimeError):
    """A diagnosis that ends the run."""


class Sentinels:
    """Checks a run at each log line. It reads the device, so it is called at log lines only."""

    def __init__(
        self, student: Student, teacher: Teacher, update: Update, mesh: Mesh, prototypes: Mapping[str, int]
    ) -> None:
        """prototypes: how many each term has."""
        self.student, self.teacher, self.update, self.mesh = student, teacher, update, mesh
        self.prototypes = dict(prototypes)
        self.lines: dict[str, int] = {}
        self.first: dict[str, float] = {}  # the first value of each term that was not 0
        self.start = self._norms(student).norm()  # on the device
        self.refused = 0
        self.before: tuple[Tensor, Tensor] | None = None

    def check(self, clock: Clock, values: dict[str, float]) -> list[Diagnosis]:
        """What is wrong by these means since the last log line, and by the state of both branches."""
        student, teacher = (self._norms(branch).cpu() for branch in (self.student, self.teacher))
        growth = (student.norm() / self.start.cpu()).item()
        found = [self._non_finite(values, growth), self._diverged(values, growth), self._pixels(values)]
        found += [*self._uniform(values), *self._above(values), self._constant(values)]
        found += self._movement(clock, (student, teacher))
        return [diagnosis for diagnosis in found if diagnosis is not None]

    def _non_finite(self, values: dict[str, float], growth: float) -> Diagnosis | None:
        total, row, cause = self.update.refusals()
        new, self.refused = total - self.refused, total
        if not new:
            return None
        limit = self.update.options.most_refused
        advice = "Lower the learning rate; if it is the first steps, check the images and the temperatures"
        if not math.isfinite(values.get("data/pixel_rms", 0.0)):
            advice = "The pixels are not finite: check the images and the loader"
        elif not growth < GROWN:
            advice = "The weights have diverged: start again with a lower learning rate"
        elif self.update.scaler is not None:
            advice = "A few of these find the scale of fp16's loss; if they go on, use bf16 or fp32"
        return Diagnosis(
            "non-finite",
            f"{new} steps since the last log line were skipped on all ranks ({row} in a row until now, {limit} end the "
            f"run); the last cause was {cause}. {advice}.",
            fatal=row >= limit,
        )

    def _diverged(self, values: dict[str, float], growth: float) -> Diagnosis | None:
        if not self._lasts("growth", not growth < GROWN, lines=1):
            return None
        return Diagnosis(
            "diverged",
            f"The student's weights have {growth:.3g} times the norm that they had at the start: each step of the learning "
            f"rate {values.get('lr', math.nan):g} undoes the last. Start again with a lower Optim.base_lr.",
        )

    def _pixels(self, values: dict[str, float]) -> Diagnosis | None:
        size = values.get("data/pixel_rms", 1.0)
        if not self._lasts("pixels", math.isfinite(size) and not PIXELS[0] <= size <= PIXELS[1], lines=1):
            return None
        return Diagnosis(
            "pixels are not normalized",
            f"The pixels of a batch have the root mean square {size:.3g}, where normalized ones have about 1. Subtract "
            "CropPolicy.mean from pixels in 0..1 and divide by CropPolicy.std, as our loaders do.",
        )

    def _uniform(self, values: dict[str, float]) -> list[Diagnosis]:
        found = []
        for term, count in self.prototypes.items():
            value = values.get(term, math.nan)
            ratio = value / math.log(count)
            if self._lasts(term, abs(ratio - 1) < UNIFORM):
                found.append(
                    Diagnosis(
                        "uniform collapse",
                        f"{term} has been {value:.4f} = {ratio:.4f} x ln {count} for {PATIENCE} log lines: student and "
                        "teacher give the same output for every image. Lower the teacher's temperature, warm up longer, "
                        "or lower the learning rate.",
                    )
                )
        return found

    def _above(self, values: dict[str, float]) -> list[Diagnosis]:
        found = []
        for term, count in self.prototypes.items():
            value = values.get(term, 0.0)
            first = self.first.setdefault(term, value) if value else math.inf
            if self._lasts(f"{term} above", value > ABOVE * max(first, math.log(count))):
                found.append(
                    Diagnosis(
                        "loss above its start",
                        f"{term} has been far above its start for {PATIENCE} log lines: {value:.4g} now, {first:.4g} at "
                        f"first, and {math.log(count):.4g} = ln {count} for a student that knows nothing. Lower the "
                        f"learning rate, now {values.get('lr', math.nan):g}, or warm up longer.",
                    )
                )
        return found

    def _constant(self, values: dict[str, float]) -> Diagnosis | None:
        here = values.get("teacher/spread", math.inf)
        if not self._lasts("spread", here < CONSTANT):
            return None
        return Diagnosis(
            "constant features",
            f"For {PATIENCE} log lines the teacher's summaries have differed only by {here:.1e} of their length. Check "
            "that the images differ, then lower the learning rate or the teacher's temperature.",
        )

    def _movement(self, clock: Clock, now: tuple[Tensor, Tensor]) -> list[Diagnosis]:
        try:
            check_teacher_student(self.teacher, self.student)
        except ValueError as problem:
            return [Diagnosis("teacher aliases student", str(problem), fatal=True)]
        before, self.before = self.before, now
        if before is None or self.update.refusals()[1]:
            return []
        student, teacher = (not torch.equal(*pair) for pair in zip(before, now, strict=True))
        if not student:
            return [
                Diagnosis(
                    "student does not move",
                    f"No parameter has changed since the last log line, at step {clock.step}. Check the learning rate.",
                )
            ]
        if not teacher:
            return [
                Diagnosis(
                    "teacher does not move",
                    "The student has changed since the last log line and the teacher has not. Check the teacher's momentum: "
                    "1 keeps it where it is.",
                )
            ]
        return []

    def _norms(self, branch: nn.Module) -> Tensor:
        """[P] norms of all parameters."""
        pieces = [local(parameter).detach() for parameter in branch.parameters()]
        zero = pieces[0].new_zeros(())
        norms = torch.stack([piece.norm() if piece.numel() else zero for piece in pieces])
        return self.mesh.sum_over_shards(norms.square()).sqrt()

    def _lasts(self, symptom: str, present: bool, lines: int = PATIENCE) -> bool:
        """Whether a symptom has lasted so many log lines; true once, then again after each PATIENCE."""
        self.lines[symptom] = self.lines.get(symptom, 0) + 1 if present else 0
        return present and (self.lines[symptom] - lines) % PATIENCE == 0
