"""The interface of all objectives. A method is one file here: options, the objective that they build, and its terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..checks import check, sentence
from ..records import Clock, Cues, Features, NeighborRule, Now, Side, Views


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective needs from data and branches; checked once, when a run is built."""

    global_crops: int = 1  # the smallest number
    local_crops: bool = False  # at least one local crop
    teacher_sees_local: bool = False  # the teacher computes features of the local crops too
    masks: bool = False  # the student's global crops are masked (Cues.mask)
    neighbors: NeighborRule | None = None  # the teacher aggregates neighbors into Features.neighbors
    summary: str | None = None  # the only summary head it works with: "cls" or "class_attention"
    queries: bool = False  # the student gets queries (Cues.queries), the teacher the query crops
    host: str | None = None  # the objective whose head it uses in a branch where it has none of its own
    separate_views: bool = False  # a backbone's BatchNorm takes each view as a batch of its own
    batch_norm: bool = False  # its heads have BatchNorm, which needs more than one image
    batch_divides: int | None = None  # the global batch must divide this number
    residual: bool = False  # both branches keep the patches before the final norm in Features.residual


class Masks(Protocol):
    """The source of masks: `data.masking.FixedMasks`, or `ReleasedMasks`."""

    on_host: ClassVar[bool]  # whether masks are drawn on the host, and so need the number of the first sample there

    @property
    def seed(self) -> int:
        """By which they are drawn."""
        ...

    def rows(self, views: int, batch: int, grid: tuple[int, int]) -> int:
        """The number of masked patches of a batch, or a number that no batch exceeds."""
        ...

    def __call__(self, first: Any, views: int, batch: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """[V, B, N] bool for the samples with the running numbers first .. first + batch - 1; first: an int if `on_host`, else
        an int or an int64 tensor."""
        ...


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What an objective may depend on besides its own options."""

    options: tuple[ObjectiveOptions, ...]  # of all objectives of the run
    masks: Masks
    attention_heads: int  # of the backbone
    local_crops: bool  # whether the data has any


@dataclass(frozen=True, slots=True)
class ObjectiveOptions:
    """The options of a method: a frozen dataclass with a default for each field. `build` makes the objective."""

    def build(self, context: BuildContext) -> Objective:
        raise NotImplementedError


class Objective(nn.Module):
    """A loss. It holds parameters, buffers and options, nothing else: no loop, no optimizer, no backbone, no weight.

    The engine calls, for each batch, `cue` and then `forward` with what `cue` returned, and `after_step` once per step.
    On a GPU it may record a step once and then repeat it without Python: what changes from step to step comes from
    `schedule`, whose numbers the other methods get on the device, in `now`.
    """

    name: str
    terms: tuple[str, ...] = ()
    """The names of its loss terms, so that weights are checked before the first step; empty: not known before it."""

    def needs(self) -> Needs:
        return Needs()

    def prototype_counts(self) -> dict[str, int]:
        """The number of prototypes of each term that has some, for loss / ln K in log lines and warnings."""
        return {}

    def head(self, width: int) -> nn.Module | None:
        """The head that both branches get; the teacher's follows the student's. width: of the backbone."""
        return None

    def predictor(self, width: int) -> nn.Module | None:
        """A module that only the student has."""
        return None

    def schedule(self, clock: Clock) -> dict[str, float]:
        """The numbers of the next step that follow from the clock, by name, "<objective>/<number>": always the same names."""
        return {}

    def cue(self, views: Views, grid: tuple[int, int], now: Now) -> Cues:
        """What the student's backbone gets with the global crops: a mask, or queries. grid: their rows and columns."""
        return Cues()

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        """Unweighted loss terms by name, "<objective>/<term>", each averaged over this rank's images."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Updates centers and queues, once per optimizer step. They are buffers, so checkpoints have them."""


def heads_of(name: str, student: Side, teacher: Side) -> tuple[Any, Any]:
    """The objective's head in the student and in the teacher; both must have it."""
    for side, branch in ((student, "student"), (teacher, "teacher")):
        check(
            side.head is not None,
            f"{name}: its head must be in both branches",
            f"none in the {branch}",
            "build it with head(width)",
        )
    return student.head, teacher.head


def predictor_of(name: str, student: Side) -> nn.Module:
    """The objective's predictor, which only the student has."""
    if student.predictor is None:
        raise ValueError(sentence(f"{name}: the student needs a predictor", "none", "build it with predictor(width)"))
    return student.predictor


def local_crops_of(side: Side, branch: str, needed_by: str, remedy: str) -> Features:
    """The features of a branch's local crops, which an option needs."""
    if side.local_crops is None:
        raise ValueError(sentence(f"{needed_by} needs local crops in the {branch}", "none", f"add them, or {remedy}"))
    return side.local_crops


def neighbors_of(name: str, crops: Features) -> Tensor:
    """[V, B, N, D] the aggregated neighbors of each patch, if the teacher was built to compute them."""
    if crops.neighbors is None:
        raise ValueError(
            sentence(
                f"{name}: the teacher must aggregate each patch's neighbors",
                "features without them",
                "build the teacher with this objective's needs().neighbors",
            )
        )
    return crops.neighbors
