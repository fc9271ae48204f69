"""SERE: relations between patches, and between channels, of a student's view must match those of the teacher's other view."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import sqrt
from operator import add

import torch
import torch.distributed as dist
from torch import Tensor, nn

from patchlight_kernels import self_relation

from ..checks import check, check_choice, check_numbers, sentence
from ..heads.relation import RelationFeatures, RelationHead, RelationPredictor, StudentRelations
from ..records import Crops, Cues, Features, Now, Side, Views
from .batch_relation import batch_relation_loss
from .dino import other_views
from .geometry import (
    Pairs,
    Points,
    SamplingMatrices,
    global_pairs,
    overlap,
    sample,
    sample_points,
    sampling_matrices,
    to_autocast,
)
from .interface import BuildContext, Needs, Objective, ObjectiveOptions, heads_of, predictor_of
from .targets import distributed


@dataclass(frozen=True, slots=True)
class SereOptions(ObjectiveOptions):
    """The defaults are those of the released code. Weights belong to the recipe, see `sere_weights`.

    The teacher's targets are sharpened by their temperatures, as released and in the paper's equations; its text has 0.5 and
    0.1 for the student and 1 for the teacher.
    """

    heads: int | None = None
    """M, the groups of channels that each have a spatial relation; it must divide the width. none: as many as the backbone has
    attention heads, as released; 6 in the paper, which is the same for a ViT-S."""
    teacher_spatial_temperature: float = 0.5
    """By which the teacher's products of patches are divided."""
    teacher_channel_temperature: float = 0.1
    """By which the teacher's products of channels are divided."""
    student_spatial_temperature: float = 1.0
    """By which the student's products of patches are divided."""
    student_channel_temperature: float = 1.0
    """By which the student's products of channels are divided."""
    global_points: int = 13
    """Points per side of the region that two global crops share."""
    local_points: int = 6
    """Points per side of the region that a global and a local crop share."""
    points: str = "ends"
    """ends, as released, puts the outermost points on the region's border; where it is also the view's border, the sampled
    values are halved. centers, as in the paper, puts them in the middle of equal cells."""
    scale: str = "head"
    """Spatial products are divided by the root of the channels of a head, as released, or of the width, as in the paper."""
    no_overlap: str = "count"
    """Two crops without a common region have a constant loss, the log of the number of points, and no gradient; count, as
    released, includes them in the mean; skip, as in the paper, leaves them out: the mean is then over the pairs of all ranks."""
    channel: str = "self"
    """self: how channels relate within an image (Eq. 4). batch: how they relate over the images of a batch, as in Barlow Twins,
    whose loss, a sum over channels with lambda 0.005, is the channel term then, on the same heads, with the mean of an image's
    patches as the sample. Both rows of Table 11 are without the spatial term: set its weight to 0."""
    asymmetric: bool = True
    """Only the student has a predictor after its projection. False: neither branch has one."""

    def __post_init__(self) -> None:
        check_choice("SereOptions.points", self.points, ("ends", "centers"))
        check_choice("SereOptions.scale", self.scale, ("head", "width"))
        check_choice("SereOptions.no_overlap", self.no_overlap, ("count", "skip"))
        check_choice("SereOptions.channel", self.channel, ("self", "batch"))
        check_numbers(self, heads="[1, inf)", global_points="[2, inf)", local_points="[2, inf)")
        kinds = [f"{branch}_{kind}" for branch in ("teacher", "student") for kind in ("spatial", "channel")]
        check_numbers(self, **{f"{kind}_temperature": "(0, inf)" for kind in kinds})

    def build(self, context: BuildContext) -> Sere:
        return Sere(self, self.heads or context.attention_heads, context.local_crops)


def sere_weights(base: dict[str, float], alpha: float, beta: float, rescale_base: bool = True) -> dict[str, float]:
    """The weights of a run with SERE: alpha for the spatial term, beta for the channel term, and the host's `base`.

    rescale_base: the released code multiplies the host's loss by (4 - alpha - beta) / 2: by 1.65 for iBOT's 0.2 and 0.5,
        by 1 for DINO's 1 and 1. False: the host's loss as it is, as in the paper (Eq. 6).
    """
    share = (4 - alpha - beta) / 2 if rescale_base else 1.0
    if min(alpha, beta) < 0 or share < 0:
        raise ValueError(
            "sere_weights: alpha and beta must not be negative, nor sum to more than 4 if the base is rescaled, "
            f"got {alpha} and {beta}; the paper has 0.2 and 0.5, or 1 and 1."
        )
    return {term: share * weight for term, weight in base.items()} | {"sere/spatial": alpha, "sere/channel": beta}


class Sere(Objective):
    """The terms "sere/spatial" and "sere/channel", each the plain mean over pairs of a teacher's and a student's view.

    A teacher's global crop is the target of every other global crop, and of every local crop.

    heads: M, which must divide the width. local: whether there are local crops, which have predictors of their own.
    """

    name = "sere"
    terms = ("sere/spatial", "sere/channel")

    def __init__(self, options: SereOptions, heads: int, local: bool = True) -> None:
        super().__init__()
        self.options, self.heads, self.local = options, heads, local

    def needs(self) -> Needs:
        return Needs(global_crops=2, residual=True, batch_norm=self.options.channel == "batch")

    def head(self, width: int) -> nn.Module:
        rule, got = "sere: its heads must divide the backbone's width", f"{self.heads} and {width}"
        able = [heads for heads in range(1, 65) if width % heads == 0]
        check(width % self.heads == 0, rule, got, f"set SereOptions.heads to none, or to one of {able}")
        return RelationHead(width)

    def predictor(self, width: int) -> nn.Module | None:
        if not (self.options.asymmetric or self.local):
            return None
        return RelationPredictor(width, self.options.asymmetric, self.local)

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        head, teacher_head = heads_of(self.name, student, teacher)
        views_here = len(views.global_crops.box)
        check(views_here > 1, "sere: a global crop needs another one as its target", "one per image", "use two")
        with torch.no_grad():
            projected = teacher_head(residual_of(teacher.global_crops))
            target = self.relations(projected, teacher.global_crops, views.global_crops)
        features = self.student_features(student, head)
        globals_ = self.relations(features.global_crops, student.global_crops, views.global_crops)
        locals_ = None
        if features.local_crops is not None and student.local_crops is not None and views.local_crops is not None:
            locals_ = self.relations(features.local_crops, student.local_crops, views.local_crops)
        channel = self.channel if self.options.channel == "self" else self.batch_channel
        return {
            "sere/spatial": self.spatial(target, globals_, locals_),
            "sere/channel": channel(target, globals_, locals_),
        }

    def student_features(self, student: Side, head: nn.Module) -> StudentRelations:
        """The student's features, of global and local crops, whose relations are compared."""
        if student.local_crops is not None and not self.local:
            raise ValueError(
                sentence("sere: local crops need heads of their own", "crops but no heads", "build it with local=True")
            )
        projected = head(residual_of(student.global_crops))
        if not (self.options.asymmetric or self.local):
            return StudentRelations(projected, None)
        local = None if student.local_crops is None else residual_of(student.local_crops)
        return predictor_of(self.name, student)(projected, local)

    def relations(self, features: RelationFeatures, crops_features: Features, crops: Crops) -> CropRelations:
        grid = crops_features.grid
        return CropRelations(features.spatial, features.channel, crops.box, crops.flip, grid, self.side(grid))

    def side(self, grid: tuple[int, int]) -> float:
        """The root of H W, by which features are divided before channels are related: C^T C / (H W)."""
        return sqrt(grid[0] * grid[1])

    def spatial(self, target: CropRelations, globals_: CropRelations, locals_: CropRelations | None) -> Tensor:
        """Cross-entropy of the relations between points of the region that a teacher's and a student's crop share."""
        o = self.options
        pairs = self.global_pairs(target, globals_) + ([self.local_pairs(target, locals_)] if locals_ else [])
        root = sqrt(target.spatial.shape[-1] // (self.heads if o.scale == "head" else 1))
        losses = [
            self_relation(
                self.by_head(pair.student).unsqueeze(0),
                self.by_head(pair.teacher),
                1 / (root * o.student_spatial_temperature),
                1 / (root * o.teacher_spatial_temperature),
                weight,
            )
            for pair, weight in zip(pairs, self.weights(pairs, target.spatial), strict=True)
        ]
        return reduce(add, losses)

    def weights(self, pairs: list[Pairs], like: Tensor) -> list[Tensor]:
        """[1, pairs] of each record, which make the sum over its pairs a mean over all pairs that count."""
        exact = torch.promote_types(like.dtype, torch.float32)
        numbers = [pair.exist.numel() for pair in pairs]
        if self.options.no_overlap == "count":
            return [like.new_full((1, number), 1 / sum(numbers), dtype=exact) for number in numbers]
        counted = torch.cat([pair.exist.flatten() for pair in pairs]).to(exact)
        return list((counted / mean_over_ranks(counted)).unsqueeze(0).split(numbers, dim=1))

    def global_pairs(self, target: CropRelations, globals_: CropRelations) -> list[Pairs]:
        """[V, B, 1] for each turn 1 .. V - 1: student view v and teacher view v + turn, counted modulo V."""
        o = self.options
        places = globals_.box, globals_.flip, globals_.grid
        return global_pairs(globals_.spatial, target.spatial, *places, o.global_points, o.points)

    def local_pairs(self, target: CropRelations, locals_: CropRelations) -> Pairs:
        """[L, B, V] each local crop of the student and each global crop of the teacher."""
        crops, places = (locals_, target), (len(locals_.box), *target.flip.T.shape)
        # [2, L, B, V, 4] and [2, L, B, V]: of the local crop and of the global crop of each pair.
        box = torch.stack([locals_.box.unsqueeze(2).expand(*places, 4), target.box.transpose(0, 1).expand(*places, 4)])
        flip = torch.stack([locals_.flip.unsqueeze(2).expand(places), target.flip.T.expand(places)])
        shared = overlap(*box)
        points = sample_points(shared, box, flip, self.options.local_points, self.options.points)
        at, target_at = (sampling_matrices(Points(xy), c.grid) for xy, c in zip(points.xy, crops, strict=True))
        at_VBL = SamplingMatrices(target_at.rows.transpose(0, 2), target_at.columns.transpose(0, 2))
        teacher = sample(target.spatial, target.grid, at_VBL).transpose(0, 2)
        return Pairs(teacher, sample(locals_.spatial, locals_.grid, at), shared.exists)

    def by_head(self, x: Tensor) -> Tensor:
        """[A, B, R, points, D] to [A * B * R, M, points, D / M]; heads are contiguous groups of channels."""
        return x.flatten(0, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def channel(self, target: CropRelations, globals_: CropRelations, locals_: CropRelations | None) -> Tensor:
        """Cross-entropy of the relations between channels; every view has all channels, so nothing is sampled."""
        teacher, student = (to_autocast(crops.channel) for crops in (target, globals_))
        views, batch = teacher.shape[:2]
        # Student view v and teacher view v + turn, counted modulo V, are one view of V * B images here.
        turned = [teacher.roll(-turn, 0).flatten(0, 1) for turn in range(1, views)]
        related = [(globals_, student.flatten(0, 1).unsqueeze(0), view) for view in turned]
        if locals_:
            student = to_autocast(locals_.channel)
            related += [(locals_, student, view) for view in teacher]
        pairs = views * (views - 1 + (len(locals_.channel) if locals_ else 0))
        exact = torch.promote_types(student.dtype, torch.float32)
        losses = [
            self_relation(
                by_channel(student),
                by_channel(view),
                1 / (crops.side**2 * self.options.student_channel_temperature),
                1 / (target.side**2 * self.options.teacher_channel_temperature),
                student.new_full(student.shape[:2], 1 / (pairs * batch), dtype=exact),
            )
            for crops, student, view in related
        ]
        return reduce(add, losses)

    def batch_channel(self, target: CropRelations, globals_: CropRelations, locals_: CropRelations | None) -> Tensor:
        """Barlow Twins' loss of the same pairs, with an image's mean over its patches as the sample of each channel."""
        teacher = target.channel.mean(dim=2)
        student = torch.cat([crops.channel.mean(dim=2) for crops in (globals_, locals_) if crops])
        return batch_relation_loss(student, teacher, other_views(len(teacher), student))


@dataclass(frozen=True, slots=True)
class CropRelations:
    """One branch's features of crops of a size whose relations are compared, and where the crops lie in the image."""

    spatial: Tensor  # [V, B, N, D]
    channel: Tensor  # [V, B, N, D]
    box: Tensor  # [V, B, 4]
    flip: Tensor  # [V, B]
    grid: tuple[int, int]
    side: float  # what features are divided by before channels are related


def residual_of(crops: Features) -> Tensor:
    """The patches before the backbone's final norm."""
    if crops.residual is None:
        raise ValueError(
            sentence(
                "sere: features must come with the patches before the final norm",
                "none",
                "build branches with needs().residual",
            )
        )
    return crops.residual


def by_channel(x: Tensor) -> Tensor:
    """[..., N, D] to [..., 1, D, N]: the rows to relate are the channels."""
    return x.mT.unsqueeze(-3)


def mean_over_ranks(counted: Tensor) -> Tensor:
    """The number of pairs that count, as a mean over ranks: with it the ranks' mean loss is the mean over all pairs."""
    total, ranks = counted.sum(), 1
    if distributed():
        dist.all_reduce(total)
        ranks = dist.get_world_size()
    return total.clamp(min=1) / ranks
