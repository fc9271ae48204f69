"""iBOT: DINO whose student sees global crops with holes, and guesses what the teacher sees in the holes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_choice
from ..heads.projection import ProjectionHead
from ..heads.prototypes import Prototypes
from ..records import Clock, Cues, Side, SoftTarget, Views
from .dino import other_views
from .interface import Needs, Objective, check_heads
from .targets import TeacherTemperature, build_target, distributed


class Masks(Protocol):
    """Where masks come from: `data.masking.FixedMasks`, or `ReleasedMasks`."""

    def rows(self, views: int, batch: int, grid: tuple[int, int]) -> int:
        """The number of masked patches of a batch, or a number that no batch exceeds."""

    def __call__(self, first: int, views: int, batch: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """[V, B, N] bool for the samples with the running numbers first .. first + batch - 1."""


@dataclass(frozen=True, slots=True)
class IbotOptions:
    """The defaults are those of the published ViT-S command.

    patch_prototypes: None lets the class token and the patches share one set of prototypes; a number gives patches a
        set of their own. The released defaults separate them in the student and share them in the teacher, whose patch
        targets then never follow the student's patch prototypes; paper and published command share them throughout.
    patch_teacher_temperature and its warm-up: a schedule of its own, as released. In the paper and in the command it is
        that of the class token.
    patch_start_epoch: until then nothing is masked, the patch term is 0 and its temperature waits (50 in the published
        Swin command).
    patch_average: "image", as released: the mean over an image's masked patches, then over images, of which those
        without a mask count as 0. "sum", as the paper writes it: the sum over an image's masked patches.
    patch_center_over: whose teacher patches the patch center averages: "all" of the global crops, as released, or only
        the "masked" ones, which spares the teacher's head the others. Sinkhorn always balances the masked ones.
    """

    prototypes: int = 8192
    patch_prototypes: int | None = None
    bottleneck: int = 256
    hidden: int = 2048
    layers: int = 3
    train_norm: bool = True
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    warmup_teacher_temperature: float = 0.04
    patch_teacher_temperature: float = 0.07
    warmup_patch_teacher_temperature: float = 0.04
    warmup_epochs: int = 30
    warmup_by: str = "epoch"
    target: str = "centering"
    center_momentum: float = 0.9
    patch_center_momentum: float = 0.9
    patch_center_over: str = "all"
    patch_average: str = "image"
    patch_start_epoch: int = 0

    def __post_init__(self) -> None:
        check_choice("IbotOptions.patch_center_over", self.patch_center_over, ("all", "masked"))
        check_choice("IbotOptions.patch_average", self.patch_average, ("image", "sum"))


@dataclass(frozen=True, slots=True)
class MaskedPatches:
    """Which patches of a batch go through head and loss: a fixed number, so some may be padding."""

    row: Tensor  # [R] index into the flattened [V * B * N] patches
    valid: Tensor  # [R] bool, False for padding
    divisor: Tensor | int  # [R] what each patch's loss is divided by


class Ibot(Objective):
    """The terms "ibot/cls" (DINO, the student's global crops masked) and "ibot/patch" (masked patches, same crop)."""

    name = "ibot"

    def __init__(self, masks: Masks, options: IbotOptions | None = None) -> None:
        super().__init__()
        self.masks = masks
        self.options = o = options or IbotOptions()
        self.temperature = TeacherTemperature(
            o.warmup_teacher_temperature, o.teacher_temperature, o.warmup_epochs, o.warmup_by
        )
        self.patch_temperature = TeacherTemperature(
            o.warmup_patch_teacher_temperature,
            o.patch_teacher_temperature,
            o.warmup_epochs,
            o.warmup_by,
            o.patch_start_epoch,
        )
        self.target = build_target(o.target, o.prototypes, o.bottleneck, o.center_momentum)
        self.patch_target = build_target(
            o.target, o.patch_prototypes or o.prototypes, o.bottleneck, o.patch_center_momentum
        )
        self.mask: Tensor | None = None  # [V, B, N], from cue to forward
        self.rows = 0  # at most so many patches of it are masked
        self.batches = 0  # since the last optimizer step

    def needs(self) -> Needs:
        return Needs(masks=True)

    def head(self, width: int) -> nn.Module:
        o = self.options
        prototypes = Prototypes(o.bottleneck, o.prototypes, o.train_norm)
        own = o.patch_prototypes and Prototypes(o.bottleneck, o.patch_prototypes, o.train_norm)
        return ProjectionHead(width, o.bottleneck, o.hidden, o.layers, prototypes=prototypes, patch_prototypes=own)

    def cue(self, views: Views, grid: tuple[int, int], clock: Clock) -> Cues:
        pixels = views.global_crops.pixels
        crops, batch = pixels.shape[:2]
        rows = self.masks.rows(crops, batch, grid)
        if rows < 1:
            raise ValueError(
                f"ibot: at least one patch of a batch must be masked, got none in {crops} x {batch} crops "
                f"with a grid of {grid}; use larger ratios."
            )
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
        first = clock.images_seen + (self.batches * world + rank) * batch
        self.batches += 1
        self.mask, self.rows = self.masks(first, crops, batch, grid, pixels.device), rows
        if clock.epoch < self.options.patch_start_epoch:
            self.mask = torch.zeros_like(self.mask)  # all rows are padding: the shapes of a step stay
        return Cues(mask=self.mask)

    def forward(self, student: Side, teacher: Side, views: Views, clock: Clock) -> dict[str, Tensor]:
        check_heads(self.name, student, teacher)
        chosen = self.choose()
        target, patch_target = self.teach(teacher, chosen, clock)
        summaries = torch.cat([crops.summary for crops in student.crop_sizes()])
        patches = student.global_crops.patches.flatten(0, 2).index_select(0, chosen.row)
        z = student.head(torch.cat([summaries.flatten(0, 1), patches]))
        z, z_patch = z[: -len(patches)].unflatten(0, summaries.shape[:2]), z[-len(patches) :].unsqueeze(0)
        pairs, one = other_views(len(target.z), z), z.new_ones(1, 1)
        weight = chosen.valid.to(z.dtype) / chosen.divisor
        temperature = self.options.student_temperature
        return {
            "ibot/cls": student.head.prototypes(z, target, temperature, pairs),
            "ibot/patch": student.head.patch_prototypes(z_patch, patch_target, temperature, one, weight),
        }

    def choose(self) -> MaskedPatches:
        """The masked patches of this batch, masked ones first, then padding, without asking how many there are."""
        if self.mask is None:
            raise RuntimeError(
                "ibot: each forward needs a cue before it, got none; call cue, then the student, then forward."
            )
        mask, self.mask = self.mask, None
        crops, batch, number = mask.shape
        flat = mask.flatten()
        row = (~flat).byte().argsort(stable=True)[: self.rows]
        valid = flat[row]
        share = mask.sum(dim=2).flatten()[row // number].clamp(min=1) if self.options.patch_average == "image" else 1
        return MaskedPatches(row, valid, share * crops * batch)

    @torch.no_grad()
    def teach(self, teacher: Side, chosen: MaskedPatches, clock: Clock) -> tuple[SoftTarget, SoftTarget]:
        """The targets of the global crops' summaries and of the masked patches."""
        head, crops = teacher.head, teacher.global_crops
        temperature, patch_temperature = self.temperature.at(clock), self.patch_temperature.at(clock)
        all_patches = self.options.target == "centering" and self.options.patch_center_over == "all"
        patches = crops.patches.flatten(0, 2)
        if not all_patches:
            patches = patches.index_select(0, chosen.row)
        z = head(torch.cat([crops.summary.flatten(0, 1), patches]))
        z, z_patch = z[: -len(patches)], z[-len(patches) :]
        own = directions = head.prototypes.directions()
        if head.patch_prototypes is not head.prototypes:
            own = head.patch_prototypes.directions()
        bias = self.target(z, directions, temperature)
        patch_bias = self.patch_target(z_patch, own, patch_temperature, None if all_patches else chosen.valid)
        if all_patches:
            z_patch = z_patch.index_select(0, chosen.row)
        target = SoftTarget(z.unflatten(0, crops.summary.shape[:2]), directions, temperature, bias)
        return target, SoftTarget(z_patch.unsqueeze(0), own, patch_temperature, patch_bias)

    def after_step(self, clock: Clock) -> None:
        self.batches = 0
        self.target.after_step()
        self.patch_target.after_step()
