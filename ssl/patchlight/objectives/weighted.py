"""All objectives of a run: what they need together, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import TypeVar, cast

from torch import Tensor, nn

from ..checks import check
from ..records import Clock, Cues, Now, Side, Views, Wanted
from ..values import nearest
from .interface import Objective

T = TypeVar("T")


class WeightedObjectives(nn.Module):
    """All objectives of a run as one loss. A term without a weight has weight 1."""

    def __init__(self, parts: Sequence[Objective], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.weights = dict(weights or {})
        if all(objective.terms for objective in parts):
            check_weights(self.weights, [term for objective in parts for term in objective.terms])
        needs = [objective.needs() for objective in parts]
        _common("summary", [need.summary for need in needs])
        self._mask_from = _single("masks", [need.masks for need in needs])
        self._queries_from = _single("queries", [need.queries for need in needs])
        self.student_wants = Wanted(residual=any(need.residual for need in needs))
        self.teacher_wants = Wanted(
            local_crops=any(need.teacher_sees_local for need in needs),
            query_crops=any(need.queries for need in needs),
            neighbors=_common("neighbors", [need.neighbors for need in needs]),
            residual=self.student_wants.residual,
        )

    def objectives(self) -> list[Objective]:
        return cast("list[Objective]", list(self.parts))

    def prototype_counts(self) -> dict[str, int]:
        """The number of prototypes by term."""
        return {term: count for objective in self.objectives() for term, count in objective.prototype_counts().items()}

    def schedule(self, clock: Clock) -> dict[str, float]:
        """The numbers of all objectives for the next step."""
        return {name: value for objective in self.objectives() for name, value in objective.schedule(clock).items()}

    def cue(self, views: Views, grid: tuple[int, int], now: Now) -> Cues:
        """The mask and the queries that the student's backbone gets with the global crops."""
        cues = Cues()
        objectives = self.objectives()
        if self._mask_from is not None:
            cues = replace(cues, mask=objectives[self._mask_from].cue(views, grid, now).mask)
        if self._queries_from is not None:
            cues = replace(cues, queries=objectives[self._queries_from].cue(views, grid, now).queries)
        return cues

    def forward(
        self, student: Mapping[str, Side], teacher: Mapping[str, Side], views: Views, cues: Cues, now: Now
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the unweighted terms by name. student, teacher: each branch, as each objective gets it."""
        terms: dict[str, Tensor] = {}
        for objective in self.objectives():
            teacher_side = teacher[objective.name]
            if not objective.needs().teacher_sees_local:
                teacher_side = replace(teacher_side, local_crops=None)
            terms |= objective(student[objective.name], teacher_side, views, cues, now)
        check_weights(self.weights, list(terms))
        return reduce(add, [self.weights.get(name, 1.0) * term for name, term in terms.items()]), terms

    def after_step(self) -> None:
        for objective in self.objectives():
            objective.after_step()


def check_weights(weights: Mapping[str, float], terms: Sequence[str]) -> None:
    """Refuses a weight of a term that the run does not have."""
    unknown = [name for name in weights if name not in terms]
    if unknown:
        got = f"{unknown} where the terms are {sorted(terms)}"
        check(False, "Objectives.weights must name loss terms", got, nearest(unknown[0], terms, "correct the name"))


def _single(what: str, needs: Sequence[bool]) -> int | None:
    """The index of the only objective that needs masks, or queries: a batch can have those of one objective."""
    numbers = [number for number, needed in enumerate(needs) if needed]
    check(len(numbers) < 2, f"Objectives must agree on {what}", f"{len(numbers)} that give their own", "remove one")
    return numbers[0] if numbers else None


def _common(what: str, given: Sequence[T | None]) -> T | None:
    """The value that objectives need, or None. They share the branches, so two different values are an error."""
    values = [value for value in given if value is not None]
    check(
        all(value == values[0] for value in values),
        f"Objectives must agree on {what}",
        values,
        "change the options of one of them",
    )
    return values[0] if values else None
