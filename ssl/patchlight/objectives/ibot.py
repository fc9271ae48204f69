"""iBOT: DINO with masked global crops, whose student predicts the teacher's output for each masked patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check, check_choice, sentence
from ..heads.projection import ProjectionHead
from ..heads.prototypes import Prototypes
from ..records import Clock, Cues, Now, Side, SoftTarget, Views
from .dino import other_views
from .interface import BuildContext, Masks, Needs, Objective, ObjectiveOptions, heads_of, predictor_of
from .targets import TeacherTemperature, build_target, check_target_options, temperature_of

HEADS = ("shared", "semi", "vanilla")


@dataclass(frozen=True, slots=True)
class IbotOptions(ObjectiveOptions):
    """The defaults are those of the published ViT-S command."""

    prototypes: int = 8192
    """How many learned directions there are, K, for the class token."""
    heads: str | None = None
    """Which prototypes the patches have; the layers before them are shared, as released. shared, as in the paper and the
    published command: those of the class token. vanilla: their own in both branches. semi, the released defaults: their own in
    the student, while the teacher has one set, which follows the student's for the class token; those of the student's patches
    have no copy in the teacher. Rows of PQCL's Table 7. none: vanilla if patch_prototypes is a number, else shared."""
    patch_prototypes: int | None = None
    """How many prototypes of their own the patches have in both branches; none: as many as the class token, where heads is
    vanilla."""
    bottleneck: int = 256
    """Width of the head's output, in which the prototypes are directions."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    layers: int = 3
    """Layers of the head before the prototypes."""
    train_norm: bool = True
    """Train the prototypes' lengths, as in the published command."""
    student_temperature: float = 0.1
    """By which the student's logits are divided."""
    teacher_temperature: float = 0.07
    """By which the teacher's logits of the class token are divided after the warm-up."""
    warmup_teacher_temperature: float = 0.04
    """The same at the start of the warm-up."""
    patch_teacher_temperature: float = 0.07
    """By which the teacher's logits of patches are divided after the warm-up: a separate schedule, as released. In the paper
    and in the command it is that of the class token."""
    warmup_patch_teacher_temperature: float = 0.04
    """The same at the start of the warm-up."""
    warmup_epochs: int = 30
    """Epochs over which the teacher's temperatures change."""
    warmup_by: str = "epoch"
    """How the teacher's temperature rises: one value per epoch (epoch), as released, or per step on the same line (step)."""
    target: str = "centering"
    """What keeps the teacher from collapse: centering, as released, or sinkhorn."""
    center_momentum: float = 0.9
    """Share of the class token's center that a step keeps."""
    patch_center_momentum: float = 0.9
    """Share of the patches' center that a step keeps."""
    patch_center_over: str = "all"
    """Which teacher patches the patch center averages: all of the global crops, as released, or only the masked ones, so that
    the teacher's head computes no others. Sinkhorn always balances the masked ones."""
    patch_average: str = "image"
    """image, as released: the mean over an image's masked patches, then over images, of which those without a mask count as 0;
    sum, as in the paper: the sum over an image's masked patches."""
    patch_start_epoch: int = 0
    """Before this epoch nothing is masked, the patch term is 0 and its temperature's warm-up has not begun; 50 in the published
    Swin command."""

    def __post_init__(self) -> None:
        check_target_options(self)
        check_choice("IbotOptions.patch_center_over", self.patch_center_over, ("all", "masked"))
        check_choice("IbotOptions.patch_average", self.patch_average, ("image", "sum"))
        if self.heads is not None:
            check_choice("IbotOptions.heads, if not none,", self.heads, HEADS)
        rule = "IbotOptions.patch_prototypes needs patches with prototypes of their own in both branches"
        remedy = "leave it out, or set heads to vanilla"
        allowed = self.patch_prototypes is None or self.heads in (None, "vanilla")
        check(allowed, rule, f"{self.patch_prototypes} with heads={self.heads!r}", remedy)

    @property
    def own_patch_prototypes(self) -> int | None:
        """How many prototypes patches have of their own in both branches; None where the teacher shares its only set."""
        return self.patch_prototypes or (self.prototypes if self.heads == "vanilla" else None)

    def build(self, context: BuildContext) -> Ibot:
        return Ibot(context.masks, self)


@dataclass(frozen=True, slots=True)
class MaskedPatches:
    """The patches of a batch that go through head and loss: a fixed number, so some may be padding."""

    row: Tensor  # [R] index into the flattened [V * B * N] patches
    valid: Tensor  # [R] bool, False for padding
    divisor: Tensor | int  # [R] what each patch's loss is divided by


class Ibot(Objective):
    """The terms "ibot/cls" (DINO, the student's global crops masked) and "ibot/patch" (masked patches, same crop)."""

    name = "ibot"
    terms = ("ibot/cls", "ibot/patch")

    def __init__(self, masks: Masks, options: IbotOptions | None = None) -> None:
        super().__init__()
        self.masks = masks
        self.options = o = options or IbotOptions()
        self.temperature = temperature_of(o)
        self.patch_temperature = TeacherTemperature(
            o.warmup_patch_teacher_temperature,
            o.patch_teacher_temperature,
            o.warmup_epochs,
            o.warmup_by,
            o.patch_start_epoch,
        )
        self.target = build_target(o.target, o.prototypes, o.center_momentum)
        self.patch_target = build_target(o.target, o.own_patch_prototypes or o.prototypes, o.patch_center_momentum)

    def needs(self) -> Needs:
        return Needs(masks=True)

    def prototype_counts(self) -> dict[str, int]:
        o = self.options
        return {"ibot/cls": o.prototypes, "ibot/patch": o.own_patch_prototypes or o.prototypes}

    def head(self, width: int) -> nn.Module:
        o = self.options
        prototypes, own = Prototypes(o.bottleneck, o.prototypes, o.train_norm), o.own_patch_prototypes
        for_patches = Prototypes(o.bottleneck, own, o.train_norm) if own else None
        return ProjectionHead(
            width, o.bottleneck, o.hidden, o.layers, prototypes=prototypes, patch_prototypes=for_patches
        )

    def predictor(self, width: int) -> nn.Module | None:
        """The student's prototypes for patches, where the teacher has none."""
        o = self.options
        return Prototypes(o.bottleneck, o.prototypes, o.train_norm) if o.heads == "semi" else None

    def schedule(self, clock: Clock) -> dict[str, float]:
        return {
            "ibot/teacher_temperature": self.temperature.at(clock),
            "ibot/patch_teacher_temperature": self.patch_temperature.at(clock),
            "ibot/masks_patches": float(clock.epoch >= self.options.patch_start_epoch),
        }

    def cue(self, views: Views, grid: tuple[int, int], now: Now) -> Cues:
        pixels = views.global_crops.pixels
        crops, batch = pixels.shape[:2]
        check(
            self.masks.rows(crops, batch, grid) > 0,
            "ibot: at least one patch of a batch must be masked",
            f"none in {crops} x {batch} crops with a grid of {grid}",
            "use larger ratios",
        )
        first = now.clock.first_image if self.masks.on_host else now.first_image
        mask = self.masks(first, crops, batch, grid, pixels.device)
        if self.options.patch_start_epoch:  # until then all rows are padding, so the shapes of a step stay the same
            mask = mask & now["ibot/masks_patches"].bool()
        return Cues(mask=mask)

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        head, teacher_head = heads_of(self.name, student, teacher)
        masked = self.masked_patches(cues, student.global_crops.grid)
        target, patch_target = self.teacher_targets(teacher, teacher_head, masked, now)
        summaries = torch.cat([crops.summary for crops in student.crop_sizes()])
        patches = student.global_crops.patches.flatten(0, 2).index_select(0, masked.row)
        z = head(torch.cat([summaries.flatten(0, 1), patches]))
        z, z_patch = z[: -len(patches)].unflatten(0, summaries.shape[:2]), z[-len(patches) :].unsqueeze(0)
        pairs, same_view = other_views(len(target.z), z), z.new_ones(1, 1)
        weight = masked.valid.to(z.dtype) / masked.divisor
        temperature = self.options.student_temperature
        patch_prototypes: Any = (
            predictor_of(self.name, student) if self.options.heads == "semi" else head.patch_prototypes
        )
        return {
            "ibot/cls": head.prototypes(z, target, temperature, pairs),
            "ibot/patch": patch_prototypes(z_patch, patch_target, temperature, same_view, weight),
        }

    def masked_patches(self, cues: Cues, grid: tuple[int, int]) -> MaskedPatches:
        """Masked patches first, then padding. Their number is never read on the host."""
        if cues.mask is None:
            raise ValueError(sentence("ibot: forward needs the mask that cue returned", "none", "pass cue's result on"))
        crops, batch, number = cues.mask.shape
        flat, rows = cues.mask.flatten(), self.masks.rows(crops, batch, grid)
        patch = torch.arange(len(flat), device=flat.device)
        until = flat.cumsum(0)  # masked patches up to this one
        place = torch.where(flat, until - 1, patch - until + until[-1])
        row = torch.empty_like(patch).scatter_(0, place, patch)[:rows]
        valid, divisor = patch[:rows] < until[-1], crops * batch
        if self.options.patch_average == "image":
            in_image = (cues.mask.sum(dim=2) * divisor).clamp(min=divisor)
            return MaskedPatches(row, valid, in_image.flatten().index_select(0, row // number))
        return MaskedPatches(row, valid, divisor)

    @torch.no_grad()
    def teacher_targets(
        self, teacher: Side, head: Any, masked: MaskedPatches, now: Now
    ) -> tuple[SoftTarget, SoftTarget]:
        """The targets of the global crops' summaries and of the masked patches."""
        crops = teacher.global_crops
        temperature, patch_temperature = now["ibot/teacher_temperature"], now["ibot/patch_teacher_temperature"]
        all_patches = self.options.target == "centering" and self.options.patch_center_over == "all"
        patches = crops.patches.flatten(0, 2)
        if not all_patches:
            patches = patches.index_select(0, masked.row)
        z = head(torch.cat([crops.summary.flatten(0, 1), patches]))
        z, z_patch = z[: -len(patches)], z[-len(patches) :]
        patch_directions = directions = head.prototypes.directions()
        if head.patch_prototypes is not head.prototypes:
            patch_directions = head.patch_prototypes.directions()
        bias = self.target(z, directions, temperature)
        counts = None if all_patches else masked.valid
        patch_bias = self.patch_target(z_patch, patch_directions, patch_temperature, counts)
        if all_patches:
            z_patch = z_patch.index_select(0, masked.row)
        target = SoftTarget(z.unflatten(0, crops.summary.shape[:2]), directions, temperature, bias)
        return target, SoftTarget(z_patch.unsqueeze(0), patch_directions, patch_temperature, patch_bias)

    def after_step(self) -> None:
        self.target.after_step()
        self.patch_target.after_step()
