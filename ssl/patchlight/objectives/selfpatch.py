"""SelfPatch: each patch of the student learns from what the teacher makes of that patch's most similar neighbors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..heads.projection import ProjectionHead
from ..heads.prototypes import Prototypes
from ..records import Clock, Features, NeighborRule, Side, SoftTarget, Views
from .interface import Needs, Objective, check_heads, local_crops_of
from .targets import TeacherTemperature, build_target


@dataclass(frozen=True, slots=True)
class SelfPatchOptions:
    """The defaults are those of the released code and its published command.

    The paper weighs this term 0.1 against DINO's 1; weights belong to the recipe. Its PASS version warms the teacher's
    temperature up, 0.04 to 0.07 in 30 epochs, where the released command keeps 0.04.

    hidden_norm: as DINO's.
    neighbors: the window, how many neighbors, what lies beyond the border and how they are pooled.
    teacher_sees_local: True as released (the paper does not say): local crops teach themselves too, for which the
        teacher runs on them. False spares it that, as in DINO: the term is then over global crops only.
    average: "crop", as released: the mean within each crop, then over crops, so that a patch of a small crop weighs
        more (5.4 times for 36 against 196 patches). "patch": every patch of the batch weighs the same.
    center_over: whose teacher patches the center averages: those of "all" crops as released (the paper has no center
        for patches), or of the "global" crops only, as DINO's center. Each patch counts once in either.
    """

    prototypes: int = 4096
    bottleneck: int = 256
    hidden: int = 2048
    layers: int = 3
    hidden_norm: str | None = None
    train_norm: bool = False
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    warmup_teacher_temperature: float = 0.04
    warmup_epochs: int = 0
    warmup_by: str = "epoch"
    target: str = "centering"
    center_momentum: float = 0.9
    center_over: str = "all"
    neighbors: NeighborRule = field(default_factory=NeighborRule)
    teacher_sees_local: bool = True
    average: str = "crop"

    def __post_init__(self) -> None:
        check_choice("SelfPatchOptions.center_over", self.center_over, ("all", "global"))
        check_choice("SelfPatchOptions.average", self.average, ("crop", "patch"))


class SelfPatch(Objective):
    """The term "selfpatch/patch": a student patch against the teacher's neighbors of that patch, in the same crop."""

    name = "selfpatch"

    def __init__(self, options: SelfPatchOptions | None = None) -> None:
        super().__init__()
        self.options = o = options or SelfPatchOptions()
        self.temperature = TeacherTemperature(
            o.warmup_teacher_temperature, o.teacher_temperature, o.warmup_epochs, o.warmup_by
        )
        self.target = build_target(o.target, o.prototypes, o.bottleneck, o.center_momentum)

    def needs(self) -> Needs:
        local, neighbors = self.options.teacher_sees_local, self.options.neighbors
        summary = "class_attention" if neighbors.pool == "class_attention" else None
        return Needs(local_crops=local, teacher_sees_local=local, neighbors=neighbors, summary=summary)

    def head(self, width: int) -> nn.Module:
        o = self.options
        prototypes = Prototypes(o.bottleneck, o.prototypes, o.train_norm)
        return ProjectionHead(width, o.bottleneck, o.hidden, o.layers, prototypes=prototypes, hidden_norm=o.hidden_norm)

    def forward(self, student: Side, teacher: Side, views: Views, clock: Clock) -> dict[str, Tensor]:
        check_heads(self.name, student, teacher)
        target = self.teach(teacher, self.temperature.at(clock))
        crops = self.taught(student, "student")
        z = student.head(torch.cat([size.patches.flatten(0, 2) for size in crops])).unsqueeze(0)
        weight, pair = self.patch_weight(crops, z), z.new_ones(1, 1)
        return {"selfpatch/patch": student.head.prototypes(z, target, self.options.student_temperature, pair, weight)}

    def taught(self, side: Side, branch: str) -> list[Features]:
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
    def teach(self, teacher: Side, temperature: float) -> SoftTarget:
        """One target per patch, global crops first."""
        crops = self.taught(teacher, "teacher")
        if any(size.neighbors is None for size in crops):
            raise ValueError(
                "selfpatch: the teacher must aggregate each patch's neighbors, got features without them; "
                "build the teacher with this objective's needs().neighbors."
            )
        z = teacher.head(torch.cat([size.neighbors.flatten(0, 2) for size in crops]))
        directions = teacher.head.prototypes.directions()
        counted = z[: crops[0].patches.shape[:3].numel()] if self.options.center_over == "global" else z
        return SoftTarget(z.unsqueeze(0), directions, temperature, self.target(counted, directions, temperature))

    def after_step(self, clock: Clock) -> None:
        self.target.after_step()
