"""SelfPatch with negatives: a student patch must match its aggregated neighbors among the summaries of other images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_numbers
from ..records import Cues, Features, NeighborRule, Now, Side, Views
from .contrast import check_contrast_options, cross_entropy, gather_rows, unit_rows
from .interface import BuildContext, Needs, Objective, ObjectiveOptions, heads_of, neighbors_of, predictor_of
from .moby import moby_head


@dataclass(frozen=True, slots=True)
class SelfPatchContrastOptions(ObjectiveOptions):
    """SelfPatch beside MoBY (section 5.2): "negative pairs by sampling global representations of different images".

    The paper has only that sentence, and no code is released. Here the negatives are the teacher's summaries of all views
    of all other images of the global batch, through the neighbors' head; temperature and heads are MoBY's.
    """

    temperature: float = 0.2
    """By which cosines are divided before the softmax."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    out: int = 256
    """Width of what projector and predictor return."""
    layers: int = 2
    """Layers of the projector."""
    predictor_layers: int = 2
    """Layers of the predictor."""
    neighbors: NeighborRule = field(default_factory=NeighborRule)
    """The window, how many neighbors, what lies beyond the border and how they are pooled."""

    def __post_init__(self) -> None:
        check_contrast_options(self)
        check_numbers(self.neighbors, radius="[1, inf)", k="[1, inf)")

    def build(self, context: BuildContext) -> SelfPatchContrast:
        return SelfPatchContrast(self)


class SelfPatchContrast(Objective):
    """The term "selfpatch_contrast/patch", over the global crops."""

    name = "selfpatch_contrast"
    terms = ("selfpatch_contrast/patch",)

    def __init__(self, options: SelfPatchContrastOptions | None = None) -> None:
        super().__init__()
        self.options = options or SelfPatchContrastOptions()

    def needs(self) -> Needs:
        rule = self.options.neighbors
        summary = "class_attention" if rule.pool == "class_attention" else None
        return Needs(neighbors=rule, summary=summary, separate_views=True, batch_norm=True)

    def head(self, width: int) -> nn.Module:
        return moby_head(width, self.options.layers, self.options)

    def predictor(self, width: int) -> nn.Module:
        return moby_head(self.options.out, self.options.predictor_layers, self.options)

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        head, teacher_head = heads_of(self.name, student, teacher)
        predictor, patches = predictor_of(self.name, student), student.global_crops.patches
        queries = unit_rows(predictor(head(patches.flatten(1, 2))))
        keys, others, first = self.build_keys(teacher.global_crops, teacher_head)
        return {"selfpatch_contrast/patch": self.contrast(queries.view(*patches.shape[:3], -1), keys, others, first)}

    @torch.no_grad()
    def build_keys(self, crops: Features, head: Any) -> tuple[Tensor, Tensor, int]:
        """Keys [V, B, N, D], the summaries [V, B * world, D] of all ranks, and the index of this rank's first."""
        neighbors = neighbors_of(self.name, crops)
        shape = neighbors.shape
        rows = unit_rows(head(torch.cat([neighbors.flatten(1, 2), crops.summary], dim=1)))
        keys, summaries = rows.split((shape[1] * shape[2], shape[1]), dim=1)
        return keys.reshape(*shape[:3], -1), *gather_rows(summaries)

    def contrast(self, queries_VBND: Tensor, keys_VBND: Tensor, others_VMD: Tensor, first: int) -> Tensor:
        """All inputs are normalized. An image's own summaries, at `first` + its number, are not among its others."""
        batch = queries_VBND.shape[1]
        own_image = torch.arange(batch, device=others_VMD.device) + first
        with torch.autocast(others_VMD.device.type, enabled=False):
            own = (queries_VBND * keys_VBND).sum(dim=-1, keepdim=True)
            scores = torch.einsum("vbnd,umd->vbnum", queries_VBND, others_VMD)
            same = (own_image[:, None] == torch.arange(others_VMD.shape[1], device=own_image.device))[:, None, None, :]
            logits = torch.cat([own, scores.masked_fill(same, -torch.inf).flatten(3)], dim=-1).flatten(0, 2)
        place = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return cross_entropy(logits / self.options.temperature, place)
