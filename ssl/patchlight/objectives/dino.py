"""DINO: the student's output for one view of an image is trained towards the teacher's output for the other views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check, check_choice, check_numbers
from ..heads.projection import ProjectionHead
from ..heads.prototypes import Prototypes
from ..records import Clock, Cues, Now, Side, SoftTarget, Views
from .geometry import global_pairs
from .interface import BuildContext, Needs, Objective, ObjectiveOptions, heads_of, local_crops_of
from .targets import build_target, check_target_options, temperature_of


@dataclass(frozen=True, slots=True)
class DinoOptions(ObjectiveOptions):
    """The defaults are those of the released code; paper and 300-epoch command have a teacher's temperature of 0.04 to 0.07 in
    30 epochs."""

    prototypes: int = 65536
    """How many learned directions there are, K."""
    bottleneck: int = 256
    """Width of the head's output, in which the prototypes are directions."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    layers: int = 3
    """Layers of the head before the prototypes."""
    hidden_norm: str | None = None
    """none as released, or batch: BatchNorm after the head's hidden layers, which the released code offers and without which
    short runs on little data hardly learn."""
    train_norm: bool = False
    """Train the prototypes' lengths; False as released (norm_last_layer=True), True is advised for ViT-S."""
    student_temperature: float = 0.1
    """By which the student's logits are divided."""
    teacher_temperature: float = 0.04
    """By which the teacher's logits are divided after the warm-up."""
    warmup_teacher_temperature: float = 0.04
    """The same at the start of the warm-up."""
    warmup_epochs: int = 0
    """Epochs over which the teacher's temperature changes; 0: constant, as in the code's defaults."""
    warmup_by: str = "epoch"
    """How the teacher's temperature rises: one value per epoch (epoch), as released, or per step on the same line (step)."""
    target: str = "centering"
    """What keeps the teacher from collapse: centering, as released, or sinkhorn."""
    center_momentum: float = 0.9
    """Share of the center that a step keeps."""
    patches: bool = False
    """Adds the clustering of patches, the term dino/patch: DINO+ of SERE's Table 10, which its text names in a sentence. Here a
    student's patches get the teacher's targets for the same points of the other global crop, through the same head; points that
    two crops share are spread as in SERE, and their features are read bilinearly."""
    patch_points: int = 13
    """Points per side of the region that two global crops share, for the patches; 13 as in SERE."""
    center_over: str = "global"
    """Which teacher rows the center averages (or Sinkhorn balances): global crops, as DINO does, or all crops, as the released
    SelfPatch does, whose teacher gets the local crops in any case; its paper has only "as DINO"."""

    def __post_init__(self) -> None:
        check_target_options(self)
        check_choice("DinoOptions.center_over", self.center_over, ("global", "all"))
        check_numbers(self, patch_points="[2, inf)")

    def build(self, context: BuildContext) -> Dino:
        return Dino(self)


class Dino(Objective):
    """The term "dino/cls": each of the teacher's global crops is the target of all other crops of the student.

    With `patches` also "dino/patch": the same for points of global crops. A pair of crops without a common region adds 0, and
    its points are not in the patches' center.
    """

    name = "dino"

    def __init__(self, options: DinoOptions | None = None) -> None:
        super().__init__()
        self.options = o = options or DinoOptions()
        self.terms = ("dino/cls", "dino/patch") if o.patches else ("dino/cls",)
        self.temperature = temperature_of(o)
        self.target = build_target(o.target, o.prototypes, o.center_momentum)
        self.patch_target = build_target(o.target, o.prototypes, o.center_momentum) if o.patches else None

    def needs(self) -> Needs:
        o = self.options
        return Needs(global_crops=2 if o.patches else 1, teacher_sees_local=o.center_over == "all")

    def prototype_counts(self) -> dict[str, int]:
        return dict.fromkeys(self.terms, self.options.prototypes)

    def head(self, width: int) -> nn.Module:
        return prototype_head(width, self.options)

    def schedule(self, clock: Clock) -> dict[str, float]:
        return {"dino/teacher_temperature": self.temperature.at(clock)}

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        head, teacher_head = heads_of(self.name, student, teacher)
        has_local = student.local_crops is not None
        target = self.teacher_targets(teacher, teacher_head, now["dino/teacher_temperature"], has_local)
        z = head(torch.cat([crops.summary for crops in student.crop_sizes()]))
        pairs = other_views(len(target.z), z)
        terms = {"dino/cls": head.prototypes(z, target, self.options.student_temperature, pairs)}
        if self.patch_target is not None:
            terms["dino/patch"] = self.patch_term(student, teacher, views, now["dino/teacher_temperature"])
        return terms

    def patch_term(self, student: Side, teacher: Side, views: Views, temperature: Tensor) -> Tensor:
        """The mean over pairs of a student's and a teacher's global crop, images and points."""
        assert self.patch_target is not None
        o, crops, head, teacher_head = self.options, views.global_crops, *heads_of(self.name, student, teacher)
        patches = student.global_crops.patches, teacher.global_crops.patches
        pairs = global_pairs(*patches, crops.box, crops.flip, student.global_crops.grid, o.patch_points, "centers")
        counted = torch.cat([pair.exist.flatten() for pair in pairs]).repeat_interleave(o.patch_points**2)
        with torch.no_grad():
            z = teacher_head(torch.cat([pair.teacher.flatten(0, 3) for pair in pairs]))
            directions = teacher_head.prototypes.directions()
            bias = self.patch_target(z, directions, temperature, counted)
        target = SoftTarget(z.unsqueeze(0), directions, temperature, bias)
        z = head(torch.cat([pair.student.flatten(0, 3) for pair in pairs])).unsqueeze(0)
        return head.prototypes(z, target, o.student_temperature, z.new_ones(1, 1), counted.to(z.dtype) / len(counted))

    @torch.no_grad()
    def teacher_targets(self, teacher: Side, head: Any, temperature: Tensor, has_local: bool) -> SoftTarget:
        """The targets of the global crops; with center_over="all" the local crops are in the center's mean."""
        sizes = [teacher.global_crops]
        if self.options.center_over == "all" and has_local:
            sizes.append(local_crops_of(teacher, "teacher", "dino: center_over='all'", "set it to 'global'"))
        z = head(torch.cat([crops.summary for crops in sizes]))
        directions = head.prototypes.directions()
        bias = self.target(z.flatten(0, 1), directions, temperature)
        return SoftTarget(z[: len(teacher.global_crops.summary)], directions, temperature, bias)

    def after_step(self) -> None:
        self.target.after_step()
        if self.patch_target is not None:
            self.patch_target.after_step()


def prototype_head(width: int, options: Any) -> ProjectionHead:
    """The head of DINO and SelfPatch by the options' fields for it."""
    prototypes = Prototypes(options.bottleneck, options.prototypes, options.train_norm)
    return ProjectionHead(
        width,
        options.bottleneck,
        options.hidden,
        options.layers,
        prototypes=prototypes,
        hidden_norm=options.hidden_norm,
    )


def other_views(teacher_views: int, z_SRD: Tensor) -> Tensor:
    """[T, S] weights of pairs of views: 0 on the diagonal, where both have the same crop, equal elsewhere, sum 1."""
    pairs = teacher_views * (len(z_SRD) - 1)
    check(pairs > 0, "A view needs another view as its target", "one crop per image", "use two global crops")
    return z_SRD.new_full((teacher_views, len(z_SRD)), 1 / pairs).fill_diagonal_(0)
