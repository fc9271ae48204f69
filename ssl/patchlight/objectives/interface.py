"""What every objective offers. A method is one file here; combining methods is a list in a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..records import Clock, Cues, Features, NeighborRule, Side, Views


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective asks of data and branches; checked once, when a run is built."""

    global_crops: int = 1  # at least so many
    local_crops: bool = False  # at least one local crop
    teacher_sees_local: bool = False  # the teacher runs on local crops too
    masks: bool = False  # the student's global crops are masked (Cues.mask)
    neighbors: NeighborRule | None = None  # the teacher aggregates neighbors into Features.neighbors
    summary: str | None = None  # the summary head it insists on: "cls" or "class_attention"
    queries: bool = False  # the student is cued with queries (Cues.queries), the teacher sees the query crops
    host: str | None = None  # the objective whose head it sees in a branch where it has none of its own
    views_apart: bool = False  # a backbone's BatchNorm takes each view as a batch of its own
    batch_norm: bool = False  # its heads have BatchNorm, which cannot do with a single image
    batch_divides: int | None = None  # the global batch must divide this number
    residual: bool = False  # both branches leave the patches before the final norm in Features.residual


class Objective(nn.Module):
    """A loss and its state. It holds no loop, no optimizer and no backbone, and never weighs itself."""

    name: str

    def needs(self) -> Needs:
        return Needs()

    def adapt(self, width: int, heads: int) -> None:
        """Hears the width and the attention heads of the backbone, before any module is built for it."""

    def head(self, width: int) -> nn.Module | None:
        """The head that goes into the student and, as an EMA twin, into the teacher."""
        return None

    def predictor(self, width: int) -> nn.Module | None:
        """A module that only the student has."""
        return None

    def cue(self, views: Views, grid: tuple[int, int], clock: Clock) -> Cues:
        """What the student is told about the global crops (grid: their patch grid) before it looks."""
        return Cues()

    def forward(self, student: Side, teacher: Side, views: Views, clock: Clock) -> dict[str, Tensor]:
        """Unweighted loss terms by name, "<objective>/<term>", each averaged over this rank's images."""
        raise NotImplementedError

    def after_step(self, clock: Clock) -> None:
        """Moves centers and queues, once per optimizer step. State is buffers, so it checkpoints."""


def check_heads(name: str, *sides: Side) -> None:
    """Both branches must carry the objective's head."""
    for side, branch in zip(sides, ("student", "teacher"), strict=True):
        if side.head is None:
            raise ValueError(
                f"{name}: its head must be in both branches, got none in the {branch}; build it with head(width)."
            )


def local_crops_of(side: Side, branch: str, asked_by: str, remedy: str) -> Features:
    """A branch's local crops, which an option asked for."""
    if side.local_crops is None:
        raise ValueError(f"{asked_by} needs local crops in the {branch}, got none; feed them to it, or {remedy}.")
    return side.local_crops
