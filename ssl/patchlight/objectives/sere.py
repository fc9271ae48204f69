"""SERE: an image's patches, and its channels, should relate to each other in one view as the teacher relates them in another."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor, nn

from patchlight_kernels import self_relation

from ..checks import check_choice, check_least, check_positive
from ..heads.relation import RelationFeatures, RelationHead, RelationPredictor, StudentRelations
from ..records import Clock, Crops, Features, Side, Views
from .geometry import Overlap, overlap, sample_patches, sampling_matrices
from .interface import Needs, Objective, check_heads
from .targets import distributed


@dataclass(frozen=True, slots=True)
class SereOptions:
    """The defaults are those of the released code. Weights belong to the recipe, see `sere_weights`.

    heads: M, the groups of channels that each have a spatial relation. None: as many as the backbone has attention
        heads, as released; the paper says 6, which is the same for a ViT-S. M must divide the width.
    teacher_*_temperature and student_*_temperature: the teacher's targets are sharpened, as released and as the paper's
        equations have it; its text gives 0.5 and 0.1 to the student and 1 to the teacher.
    global_points, local_points: points per side of the region that two global crops, or a global and a local one, share.
    points: "ends", as released, puts the outermost points on the region's border, where a view's own border halves what
        they read; "centers", as the paper has it, in the middle of equal cells.
    scale: spatial products are divided by the root of the channels of a "head", as released, or of the "width", as in
        the paper.
    no_overlap: two crops without a common region have a constant loss, the log of the number of points, and no gradient;
        "count" has them in the mean, as released, "skip" leaves them out, as the paper does. The mean is then over the
        pairs of all ranks.
    asymmetric: the student predicts, from its own projection, what the teacher shows. False: both show projections.
    """

    heads: int | None = None
    teacher_spatial_temperature: float = 0.5
    teacher_channel_temperature: float = 0.1
    student_spatial_temperature: float = 1.0
    student_channel_temperature: float = 1.0
    global_points: int = 13
    local_points: int = 6
    points: str = "ends"
    scale: str = "head"
    no_overlap: str = "count"
    asymmetric: bool = True

    def __post_init__(self) -> None:
        check_choice("SereOptions.points", self.points, ("ends", "centers"))
        check_choice("SereOptions.scale", self.scale, ("head", "width"))
        check_choice("SereOptions.no_overlap", self.no_overlap, ("count", "skip"))
        for branch in ("teacher", "student"):
            for kind in ("spatial", "channel"):
                name = f"{branch}_{kind}_temperature"
                check_positive(f"SereOptions.{name}", getattr(self, name), "0.5 is usual")
        check_least("SereOptions.heads", 1 if self.heads is None else self.heads, 1, "None is usual")
        check_least("SereOptions.global_points", self.global_points, 2, "13 is usual")
        check_least("SereOptions.local_points", self.local_points, 2, "6 is usual")


def sere_weights(base: dict[str, float], alpha: float, beta: float, rescale_base: bool = True) -> dict[str, float]:
    """The weights of a run with SERE: alpha for space, beta for channels, and the host's own terms with their weights.

    rescale_base: the released code multiplies the host's loss by (4 - alpha - beta) / 2: by 1.65 for iBOT's 0.2 and 0.5,
        by 1 for DINO's 1 and 1. False: as the paper writes it (Eq. 6), the host's loss as it is.
    """
    share = (4 - alpha - beta) / 2 if rescale_base else 1.0
    if min(alpha, beta) < 0 or share < 0:
        raise ValueError(
            f"sere_weights: alpha and beta must not be negative, nor sum to more than 4 if the base is rescaled; "
            f"got {alpha} and {beta}; 0.2 and 0.5, or 1 and 1, are the paper's."
        )
    return {term: share * weight for term, weight in base.items()} | {"sere/spatial": alpha, "sere/channel": beta}


class Sere(Objective):
    """The terms "sere/spatial" and "sere/channel", each the plain mean over pairs of a teacher's and a student's view.

    A teacher's global crop teaches every other global crop, and every local crop. `local` says whether there are any.
    """

    name = "sere"

    def __init__(self, options: SereOptions | None = None, local: bool = True) -> None:
        super().__init__()
        self.options, self.local = options or SereOptions(), local
        self.heads = self.options.heads

    def needs(self) -> Needs:
        return Needs(global_crops=2, residual=True)

    def adapt(self, width: int, heads: int) -> None:
        self.heads = self.options.heads or heads

    def head(self, width: int) -> nn.Module:
        if self.heads is None or width % self.heads:
            raise ValueError(
                f"sere: its heads must divide the backbone's width, got {self.heads} and {width}; set SereOptions.heads."
            )
        return RelationHead(width)

    def predictor(self, width: int) -> nn.Module | None:
        if not (self.options.asymmetric or self.local):
            return None
        return RelationPredictor(width, self.options.asymmetric, self.local)

    def forward(self, student: Side, teacher: Side, views: Views, clock: Clock) -> dict[str, Tensor]:
        check_heads(self.name, student, teacher)
        if len(views.global_crops.box) < 2:
            raise ValueError("sere: a global crop needs another one to learn from, got one per image; use two.")
        with torch.no_grad():
            taught = self.show(teacher.head(residual(teacher.global_crops)), teacher.global_crops, views.global_crops)
        features = self.see(student)
        seen = self.show(features.global_crops, student.global_crops, views.global_crops)
        local = features.local_crops and self.show(features.local_crops, student.local_crops, views.local_crops)
        return {"sere/spatial": self.spatial(taught, seen, local), "sere/channel": self.channel(taught, seen, local)}

    def see(self, student: Side) -> StudentRelations:
        """The student's features of its global and local crops."""
        if student.local_crops is not None and not self.local:
            raise ValueError(
                "sere: local crops need heads of their own, got crops but no heads; build it with local=True."
            )
        projected = student.head(residual(student.global_crops))
        if not (self.options.asymmetric or self.local):
            return StudentRelations(projected, None)
        if student.predictor is None:
            raise ValueError("sere: its predictor must be in the student, got none; build it with predictor(width).")
        local = None if student.local_crops is None else residual(student.local_crops)
        return student.predictor(projected, local)

    def show(self, features: RelationFeatures, seen: Features, crops: Crops) -> Shown:
        return Shown(features.spatial, features.channel, crops.box, crops.flip, seen.grid, self.side(seen.grid))

    def side(self, grid: tuple[int, int]) -> float:
        """The mean side of a grid, by which features are divided before channels are related: C^T C / (H W)."""
        return sqrt(grid[0] * grid[1])

    def spatial(self, taught: Shown, seen: Shown, local: Shown | None) -> Tensor:
        """Cross-entropy of the relations between points of the regions that a teacher's and a student's crop share."""
        o = self.options
        pairs = [self.meet_others(taught, seen)] + ([self.meet_local(taught, local)] if local else [])
        exact = torch.promote_types(taught.spatial.dtype, torch.float32)
        counted = [(some.exist | (o.no_overlap == "count")).to(exact) for some in pairs]
        total = sum(some.numel() for some in counted) if o.no_overlap == "count" else mean_over_ranks(counted)
        root = sqrt(taught.spatial.shape[-1] // (self.heads if o.scale == "head" else 1))
        return sum(
            self_relation(
                self.by_head(some.student).unsqueeze(0),
                self.by_head(some.teacher),
                1 / (root * o.student_spatial_temperature),
                1 / (root * o.teacher_spatial_temperature),
                weight.flatten().unsqueeze(0) / total,
            )
            for some, weight in zip(pairs, counted, strict=True)
        )

    def meet_others(self, taught: Shown, seen: Shown) -> Pairs:
        """[V, B, V - 1] a teacher's global crop and each other global crop of the student."""
        views = range(len(taught.box))
        others = torch.stack([without(taught.box, view) for view in views]).transpose(1, 2)
        shared = overlap(taught.box.unsqueeze(2), others)
        teacher, student = (self.sample(side, shared, self.options.global_points) for side in (taught, seen))
        # What view v shows of its region with its j-th other stands at student[v, :, j]: look from the other's side.
        turned = [torch.stack([student[v, :, q - (q > v)] for v in views if v != q], dim=1) for q in views]
        return Pairs(teacher, torch.stack(turned), shared.exists)

    def meet_local(self, taught: Shown, local: Shown) -> Pairs:
        """[V, B, L] a teacher's global crop and each local crop of the student."""
        theirs, ours = taught.box.unsqueeze(2), local.box.unsqueeze(2)
        shared, turned = overlap(theirs, ours.permute(2, 1, 0, 3)), overlap(ours, theirs.permute(2, 1, 0, 3))
        teacher = self.sample(taught, shared, self.options.local_points)
        return Pairs(teacher, self.sample(local, turned, self.options.local_points).transpose(0, 2), shared.exists)

    def sample(self, shown: Shown, shared: Overlap, count: int) -> Tensor:
        """[V, B, R, points, D] the features of crops at the points of R regions each."""
        box, flip = shown.box.unsqueeze(2), shown.flip.unsqueeze(2)
        at = sampling_matrices(shared, box, flip, shown.grid, count, self.options.points)
        return sample_patches(shown.spatial, shown.grid, at)

    def by_head(self, x: Tensor) -> Tensor:
        """[V, B, R, points, D] to [V * B * R, M, points, D / M]; heads are contiguous groups of channels."""
        return for_products(x.flatten(0, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2))

    def channel(self, taught: Shown, seen: Shown, local: Shown | None) -> Tensor:
        """Cross-entropy of the relations between channels; every view has all of them, so nothing is sampled."""
        o, views, loss = self.options, len(taught.channel), 0.0
        pairs = views * (views - 1 + (len(local.channel) if local else 0))
        for view in range(views):
            target = taught.channel[view : view + 1]
            for side, students in ((seen, without(seen.channel, view)), (local, local and local.channel)):
                if side is None:
                    continue
                mean = self_relation(
                    by_channel(students),
                    by_channel(target).squeeze(0),
                    1 / (side.side**2 * o.student_channel_temperature),
                    1 / (taught.side**2 * o.teacher_channel_temperature),
                )
                loss = loss + mean * (len(students) / pairs)
        return loss


@dataclass(frozen=True, slots=True)
class Shown:
    """One branch's crops of a size, as relations see them."""

    spatial: Tensor  # [V, B, N, D]
    channel: Tensor  # [V, B, N, D]
    box: Tensor  # [V, B, 4]
    flip: Tensor  # [V, B]
    grid: tuple[int, int]
    side: float  # what features are divided by before channels are related


@dataclass(frozen=True, slots=True)
class Pairs:
    """Features at the same points of the image, R students' crops for each of a teacher's."""

    teacher: Tensor  # [V, B, R, points, D]
    student: Tensor  # [V, B, R, points, D]
    exist: Tensor  # [V, B, R] bool, whether the two crops overlap


def residual(crops: Features) -> Tensor:
    """The patches before the backbone's final norm."""
    if crops.residual is None:
        raise ValueError(
            "sere: features must come with the residual stream, got none; build branches with needs().residual."
        )
    return crops.residual


def without(views: Tensor, one: int) -> Tensor:
    """All views but one."""
    return torch.cat([views[:one], views[one + 1 :]])


def by_channel(x: Tensor) -> Tensor:
    """[S, B, N, D] to [S, B, 1, D, N]: the rows to relate are the channels."""
    return for_products(x.transpose(2, 3).unsqueeze(2))


def for_products(x: Tensor) -> Tensor:
    """What autocast makes of a product's operand."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def mean_over_ranks(counted: list[Tensor]) -> Tensor:
    """How many pairs count, on average over the ranks, so that the mean of their losses is one over all pairs."""
    total, ranks = sum(some.sum() for some in counted), 1
    if distributed():
        dist.all_reduce(total)
        ranks = dist.get_world_size()
    return total.clamp(min=1) / ranks
