"""SelfPatch: each patch of the student is trained towards the teacher's aggregate of that patch's most similar neighbors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_numbers
from ..records import Clock, Cues, Features, NeighborRule, Now, Side, SoftTarget, Views
from .dino import prototype_head
from .interface import (
    BuildContext,
    Needs,
    Objective,
    ObjectiveOptions,
    heads_of,
    local_crops_of,
    neighbors_of,
)
from .targets import build_target, check_target_options, temperature_of


@dataclass(frozen=True, slots=True)
class SelfPatchOptions(ObjectiveOptions):
    """The defaults are those of the released code and its published command.

    The paper weights this term by 0.1 and DINO's by 1; recipes set the weights. In its earlier version (PASS) the
    teacher's temperature rises from 0.04 to 0.07 in 30 epochs; in the released command it stays 0.04.
    """

    prototypes: int = 4096
    """How many learned directions there are, K."""
    bottleneck: int = 256
    """Width of the head's output, in which the prototypes are directions."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    layers: int = 3
    """Layers of the head before the prototypes."""
    hidden_norm: str | None = None
    """none as released, or batch: BatchNorm after the head's hidden layers, as DINO's."""
    train_norm: bool = False
    """Train the prototypes' lengths; False as released."""
    student_temperature: float = 0.1
    """By which the student's logits are divided."""
    teacher_temperature: float = 0.04
    """By which the teacher's logits are divided after the warm-up."""
    warmup_teacher_temperature: float = 0.04
    """The same at the start of the warm-up."""
    warmup_epochs: int = 0
    """Epochs over which the teacher's temperature changes; 0: constant."""
    warmup_by: str = "epoch"
    """How the teacher's temperature rises: one value per epoch (epoch), as released, or per step on the same line (step)."""
    target: str = "centering"
    """What keeps the teacher from collapse: centering, as released, or sinkhorn."""
    center_momentum: float = 0.9
    """Share of the center that a step keeps."""
    center_over: str = "all"
    """Which teacher patches the center averages: those of all crops as released (the paper has no center for patches), or of
    the global crops only, as DINO's center. In both, each patch counts once."""
    neighbors: NeighborRule = field(default_factory=NeighborRule)
    """The window, how many neighbors, what lies beyond the border and how they are pooled."""
    teacher_sees_local: bool = True
    """True as released (not in the paper): the term is over local crops too, so the teacher must compute them. False, as in
    DINO: the term is over global crops only, and the teacher is cheaper."""
    average: str = "crop"
    """crop, as released: the mean within each crop, then over crops, so that a patch of a small crop weighs more (5.4 times for
    36 against 196 patches); patch: every patch of the batch weighs the same."""

    def __post_init__(self) -> None:
        check_target_options(self)
        check_numbers(self.neighbors, radius="[1, inf)", k="[1, inf)")
        check_choice("SelfPatchOptions.center_over", self.center_over, ("all", "global"))
        check_choice("SelfPatchOptions.average", self.average, ("crop", "patch"))

    def build(self, context: BuildContext) -> SelfPatch:
        return SelfPatch(self)


class SelfPatch(Objective):
    """The term "selfpatch/patch": a student patch against the teacher's neighbors of that patch, in the same crop."""

    name = "selfpatch"
    terms = ("selfpatch/patch",)

    def __init__(self, options: SelfPatchOptions | None = None) -> None:
        super().__init__()
        self.options = o = options or SelfPatchOptions()
        self.temperature = temperature_of(o)
        self.target = build_target(o.target, o.prototypes, o.center_momentum)

    def needs(self) -> Needs:
        local, neighbors = self.options.teacher_sees_local, self.options.neighbors
        summary = "class_attention" if neighbors.pool == "class_attention" else None
        return Needs(local_crops=local, teacher_sees_local=local, neighbors=neighbors, summary=summary)

    def prototype_counts(self) -> dict[str, int]:
        return {"selfpatch/patch": self.options.prototypes}

    def head(self, width: int) -> nn.Module:
        return prototype_head(width, self.options)

    def schedule(self, clock: Clock) -> dict[str, float]:
        return {"selfpatch/teacher_temperature": self.temperature.at(clock)}

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        head, teacher_head = heads_of(self.name, student, teacher)
        target = self.teacher_targets(teacher, teacher_head, now["selfpatch/teacher_temperature"])
        crops = self.crop_sizes(student, "student")
        z = head(torch.cat([size.patches.flatten(0, 2) for size in crops])).unsqueeze(0)
        weight, pair = self.patch_weight(crops, z), z.new_ones(1, 1)
        return {"selfpatch/patch": head.prototypes(z, target, self.options.student_temperature, pair, weight)}

    def crop_sizes(self, side: Side, branch: str) -> list[Features]:
        """The crop sizes that the term is over."""
        if not self.options.teacher_sees_local:
            return [side.global_crops]
        local_crops = local_crops_of(side, branch, "selfpatch: teacher_sees_local=True", "set it to False")
        return [side.global_crops, local_crops]

    def patch_weight(self, crops: list[Features], z: Tensor) -> Tensor:
        """[R] the weight of each patch, global crops first; they sum to 1."""
        rows = [size.patches.shape[:3].numel() for size in crops]
        views = sum(len(size.patches) for size in crops)
        share = [len(size.patches) / views for size in crops]
        if self.options.average == "patch":
            share = [number / sum(rows) for number in rows]
        return torch.cat([z.new_full((number,), part / number) for number, part in zip(rows, share, strict=True)])

    @torch.no_grad()
    def teacher_targets(self, teacher: Side, head: Any, temperature: Tensor) -> SoftTarget:
        """One target per patch, global crops first."""
        crops = self.crop_sizes(teacher, "teacher")
        z = head(torch.cat([neighbors_of(self.name, size).flatten(0, 2) for size in crops]))
        directions = head.prototypes.directions()
        counted = z[: crops[0].patches.shape[:3].numel()] if self.options.center_over == "global" else z
        return SoftTarget(z.unsqueeze(0), directions, temperature, self.target(counted, directions, temperature))

    def after_step(self) -> None:
        self.target.after_step()
