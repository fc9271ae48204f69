"""PQCL: the student predicts, from the position of a query crop, the teacher's output for its patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check, check_choice, check_numbers
from ..data.masking import FixedMasks, MaskRule
from ..heads.projection import ProjectionHead
from ..heads.prototypes import Prototypes
from ..records import Clock, Crops, Cues, Features, Now, Queries, QueryContent, Side, SoftTarget, Views
from .dino import DinoOptions
from .geometry import ANCHORS, relative_positions
from .ibot import HEADS, IbotOptions
from .interface import BuildContext, Needs, Objective, ObjectiveOptions, heads_of
from .targets import build_target, check_target_options, temperature_of

QUERY_KEYS = ("all", "crop", "raw", "joint")
LOSS_OVER = ("masked", "all")


@dataclass(frozen=True, slots=True)
class PqclOptions(ObjectiveOptions):
    """The defaults are those of the released code, except `flip_aware`."""

    heads: str = "shared"
    """shared, as released: the queries use the host's head (iBOT's or DINO's) too. semi: the student has a separate head for
    them, the teacher has not. vanilla: both have one. Separate heads are built like the host's. A row of the paper's Table 7,
    where shared is better than semi, and semi than vanilla, has the same word for iBOT's patches: `IbotOptions.heads`."""
    query_keys: str = "all"
    """What a query attends to besides the raw tokens: all queries, as released; those of its own crop (crop); or only the raw
    tokens (raw), as Eq. (6) can also be read. joint, the paper's direct input (Fig. 4): no cross attention, all tokens attend to
    all, so that the queries also change the class token and the patches, and with them the host's loss."""
    query_mask_ratio: float = 1.0
    """The share of a query crop's positions that are masked (Fig. 5); the student sees the other patches, drawn anew for each
    crop and image. 1, as everywhere else in the paper: it sees positions alone."""
    query_loss_over: str = "masked"
    """Which positions of partly masked query crops the term is over, which the paper leaves open: the masked ones, as in iBOT, or
    all, as Eq. (8) can be read."""
    flip_aware: bool = True
    """Whether positions take account of mirrored crops. False as released: half of the global crops are mirrored, and their
    positions are then those of the patches on the opposite side."""
    anchor: str = "corner"
    """Which point of a patch its position is: its corner, as in the code and the paper, or its center."""
    student_temperature: float = 0.1
    """By which the student's logits are divided: 0.1 as released; the paper has 0.04."""
    teacher_temperature: float = 0.07
    """By which the teacher's logits are divided after the warm-up."""
    warmup_teacher_temperature: float = 0.04
    """The same at the start of the warm-up."""
    warmup_epochs: int = 30
    """Epochs over which the teacher's temperature changes."""
    warmup_by: str = "epoch"
    """How the teacher's temperature rises: one value per epoch (epoch), as released, or per step on the same line (step)."""
    target: str = "centering"
    """What keeps the teacher from collapse: centering, as released, or sinkhorn."""
    center_momentum: float = 0.9
    """Share of the center that a step keeps."""

    def __post_init__(self) -> None:
        check_target_options(self)
        check_choice("PqclOptions.heads", self.heads, HEADS)
        check_choice("PqclOptions.query_keys", self.query_keys, QUERY_KEYS)
        check_choice("PqclOptions.anchor", self.anchor, ANCHORS)
        check_choice("PqclOptions.query_loss_over", self.query_loss_over, LOSS_OVER)
        check_numbers(self, query_mask_ratio="[0, 1]")
        rule, remedy = "PqclOptions: a loss over masked positions needs some", "set query_loss_over to all"
        check(self.query_mask_ratio > 0 or self.query_loss_over == "all", rule, "query_mask_ratio=0", remedy)

    def build(self, context: BuildContext) -> Pqcl:
        partly = 0 < self.query_mask_ratio < 1
        return Pqcl(choose_host(context.options), self, context.masks.seed if partly else 0)


class Pqcl(Objective):
    """The term "pqcl/query": each patch of the query crops, predicted by the queries of each global view; mean over views.

    seed: by which the masked positions of partly masked query crops are drawn.
    """

    name = "pqcl"
    terms = ("pqcl/query",)

    def __init__(self, host: DinoOptions | IbotOptions, options: PqclOptions | None = None, seed: int = 0) -> None:
        super().__init__()
        self.host, self.options, self.seed = host, options or PqclOptions(), seed
        o, self.prototypes = self.options, host.prototypes  # as many as the host has for patches
        if isinstance(host, IbotOptions) and host.own_patch_prototypes:
            self.prototypes = host.own_patch_prototypes
        self.temperature = temperature_of(o)
        self.target = build_target(o.target, self.prototypes, o.center_momentum)

    def needs(self) -> Needs:
        return Needs(queries=True, host="ibot" if isinstance(self.host, IbotOptions) else "dino")

    def prototype_counts(self) -> dict[str, int]:
        return {"pqcl/query": self.prototypes}

    def head(self, width: int) -> nn.Module | None:
        return self._own_head(width) if self.options.heads == "vanilla" else None

    def predictor(self, width: int) -> nn.Module | None:
        return self._own_head(width) if self.options.heads == "semi" else None

    def _own_head(self, width: int) -> nn.Module:
        o = self.host
        norm = o.hidden_norm if isinstance(o, DinoOptions) else None
        prototypes = Prototypes(o.bottleneck, self.prototypes, o.train_norm)
        return ProjectionHead(width, o.bottleneck, o.hidden, o.layers, prototypes=prototypes, hidden_norm=norm)

    def schedule(self, clock: Clock) -> dict[str, float]:
        return {"pqcl/teacher_temperature": self.temperature.at(clock)}

    def cue(self, views: Views, grid: tuple[int, int], now: Now) -> Cues:
        assert views.query_crops is not None  # engine/pairing.py has checked it
        patch = views.global_crops.pixels.shape[-1] // grid[1]
        rows, columns = (side // patch for side in views.query_crops.pixels.shape[-2:])
        o = self.options
        positions = relative_positions(
            views.query_crops, views.global_crops, (rows, columns), grid, o.flip_aware, o.anchor
        )
        keys, crop = ("all", rows * columns) if o.query_keys == "crop" else (o.query_keys, None)
        content = None if o.query_mask_ratio == 1 else self.seen_content(views.query_crops, (rows, columns), now)
        return Cues(queries=Queries(positions, keys, crop, content))

    def seen_content(self, crops: Crops, grid: tuple[int, int], now: Now) -> QueryContent:
        """The query crops, and which of their patches are masked: equally many in each crop, each set as likely as another."""
        (count, batch), ratio = crops.pixels.shape[:2], self.options.query_mask_ratio
        pixels = crops.pixels.transpose(0, 1)
        if ratio == 0:
            return QueryContent(pixels, pixels.new_zeros(batch, count * grid[0] * grid[1], dtype=torch.bool))
        masks = FixedMasks(MaskRule(((ratio, 0.0),), "random"), self.seed + 1)  # not the draws of the host's masks
        rule, remedy = "pqcl: a query crop needs a masked position", "raise PqclOptions.query_mask_ratio"
        check(masks.rows(1, 1, grid) > 0, rule, f"{ratio} of {grid[0] * grid[1]}", remedy)
        mask = masks(now.first_image, count, batch, grid, pixels.device)
        return QueryContent(pixels, mask.transpose(0, 1).flatten(1))

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        host_head, teacher_head = heads_of(self.name, student, teacher)
        if student.global_crops.queries is None or teacher.query_crops is None:
            raise ValueError(
                "pqcl: the student needs queries beside its global crops, and the teacher the query crops, got none in "
                f"the {'student' if student.global_crops.queries is None else 'teacher'}; pass the cue, and "
                "query_crops=True."
            )
        target = self.teacher_targets(teacher.query_crops, teacher_head, now["pqcl/teacher_temperature"])
        head: Any = student.predictor or host_head
        z = head(student.global_crops.queries.flatten(1, 2))  # [V, B * L * n, bottleneck]
        pairs = z.new_full((1, len(z)), 1 / len(z))  # a query crop has one target, for all views of the student
        weight = self.row_weight(cues.queries, z)
        return {"pqcl/query": head.patch_prototypes(z, target, self.options.student_temperature, pairs, weight)}

    def row_weight(self, queries: Queries | None, z: Tensor) -> Tensor | None:
        """[B * Q] the weight of each position; None where all count alike."""
        if queries is None or queries.content is None or self.options.query_loss_over == "all":
            return None
        masked = queries.content.mask.flatten()
        return masked.to(z.dtype) / masked.sum()

    @torch.no_grad()
    def teacher_targets(self, crops: Features, head: Any, temperature: Tensor) -> SoftTarget:
        """One target per patch of the query crops, image by image like the queries."""
        z = head(crops.patches.transpose(0, 1).flatten(0, 2))  # [B * L * n, bottleneck]
        directions = head.patch_prototypes.directions()
        return SoftTarget(z.unsqueeze(0), directions, temperature, self.target(z, directions, temperature))

    def after_step(self) -> None:
        self.target.after_step()


def choose_host(options: Sequence[object]) -> DinoOptions | IbotOptions:
    """The options of the objective that PQCL extends, among those of a run: iBOT's, or else DINO's."""
    hosts = [given for kind in (IbotOptions, DinoOptions) for given in options if isinstance(given, kind)]
    if not hosts:
        raise ValueError(
            f"pqcl: it needs iBOT or DINO beside it, got {', '.join(type(given).__name__ for given in options)} only; "
            "add IbotOptions() or DinoOptions()."
        )
    return hosts[0]
