"""Failures that a loss curve may not make visible, each reported by its name at a log line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..records import Clock, Features
from .branches import Student, Teacher, check_teacher_student
from .dtensor import local
from .optim import Update
from .parallel import Mesh

PATIENCE = 10  # log lines in a row that a symptom must last
UNIFORM = 1e-3  # how near loss / ln K must be to 1
CONSTANT = 1e-3  # spread of the features, 1 for independent directions, below which they are constant


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong, by which numbers, and what to do; fatal ends the run."""

    name: str
    sentence: str
    fatal: bool = False


class TrainingError(RuntimeError):
    """A diagnosis that ends the run."""


def spread(features: Features) -> Tensor:
    """How much the teacher's summaries differ between the images of this rank: 1 for random directions, 0 if constant."""
    rows = nn.functional.normalize(features.summary.flatten(0, 1).float(), dim=-1)
    return (rows - rows.mean(dim=0)).square().sum(dim=-1).mean().sqrt()


class Sentinels:
    """Checks a run at each log line. It reads the device, so it is called at log lines only."""

    def __init__(
        self, student: Student, teacher: Teacher, update: Update, mesh: Mesh, prototypes: Mapping[str, int]
    ) -> None:
        """prototypes: how many each term has."""
        self.student, self.teacher, self.update, self.mesh = student, teacher, update, mesh
        self.prototypes = dict(prototypes)
        self.lines: dict[str, int] = {}
        self.refused = 0
        self.before: tuple[Tensor, Tensor] | None = None

    def check(self, clock: Clock, values: dict[str, float]) -> list[Diagnosis]:
        """What is wrong by these means since the last log line, and by the state of both branches."""
        found = [self._non_finite(), *self._uniform(values), self._constant(values), *self._movement(clock)]
        return [diagnosis for diagnosis in found if diagnosis is not None]

    def _non_finite(self) -> Diagnosis | None:
        total, row, cause = self.update.refusals()
        new, self.refused = total - self.refused, total
        if not new:
            return None
        limit = self.update.options.most_refused
        return Diagnosis(
            "non-finite",
            f"{new} steps since the last log line were skipped on all ranks ({row} in a row until now, {limit} end the "
            f"run); the last cause was {cause}. Lower the learning rate, or use bf16 or fp32 instead of fp16.",
            fatal=row >= limit,
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

    def _constant(self, values: dict[str, float]) -> Diagnosis | None:
        here = values.get("teacher/spread", math.inf)
        if not self._lasts("spread", here < CONSTANT):
            return None
        return Diagnosis(
            "constant features",
            f"For {PATIENCE} log lines the teacher's summaries have differed only by {here:.1e} of their length. Check "
            "that the images differ, then lower the learning rate or the teacher's temperature.",
        )

    def _movement(self, clock: Clock) -> list[Diagnosis]:
        try:
            check_teacher_student(self.teacher, self.student)
        except ValueError as problem:
            return [Diagnosis("teacher aliases student", str(problem), fatal=True)]
        now = self._fingerprint(self.student), self._fingerprint(self.teacher)
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

    def _fingerprint(self, branch: nn.Module) -> Tensor:
        """[P] norms of all parameters, on the host."""
        pieces = [local(parameter).detach() for parameter in branch.parameters()]
        zero = pieces[0].new_zeros(())
        norms = torch.stack([piece.norm() if piece.numel() else zero for piece in pieces])
        return self.mesh.sum_over_shards(norms.square()).cpu()

    def _lasts(self, symptom: str, present: bool) -> bool:
        """Whether a symptom has lasted PATIENCE log lines; true once, then again after as many."""
        self.lines[symptom] = self.lines.get(symptom, 0) + 1 if present else 0
        return present and self.lines[symptom] % PATIENCE == 0
