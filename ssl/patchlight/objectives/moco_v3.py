"""MoCo v3: the student's query of one view must match the teacher's key of the other among the keys of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..heads.contrast import ContrastHead
from ..records import Cues, Now, Side, Views
from .contrast import check_contrast_options, cross_entropy, gather_rows, ordered_pairs, queries_and_keys
from .interface import BuildContext, Needs, Objective, ObjectiveOptions


@dataclass(frozen=True, slots=True)
class MocoV3Options(ObjectiveOptions):
    """The defaults are those of the ViT recipes. The released ResNet-50 has temperature=1, layers=2,
    predictor_last_norm=False.

    The released code updates the teacher at the start of the next step, with that step's momentum; so the only difference
    is that its schedule of the momentum is one step ahead of ours.
    """

    temperature: float = 0.2
    """By which cosines are divided before the softmax."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    out: int = 256
    """Width of what projector and predictor return."""
    layers: int = 3
    """Layers of the projector."""
    predictor_layers: int = 2
    """Layers of the predictor."""
    predictor_last_norm: bool = True
    """BatchNorm (without scale and shift) ends the predictor too, as it always ends the projector."""

    def __post_init__(self) -> None:
        check_contrast_options(self)

    def build(self, context: BuildContext) -> MocoV3:
        return MocoV3(self)


class MocoV3(Objective):
    """The term "moco_v3/contrast": the sum over both directions of cross-entropy x 2 x temperature."""

    name = "moco_v3"
    terms = ("moco_v3/contrast",)

    def __init__(self, options: MocoV3Options | None = None) -> None:
        super().__init__()
        self.options = options or MocoV3Options()

    def needs(self) -> Needs:
        return Needs(global_crops=2, separate_views=True, batch_norm=True)

    def head(self, width: int) -> nn.Module:
        o = self.options
        return ContrastHead(width, o.hidden, o.out, o.layers, bias=False, last_norm=True)

    def predictor(self, width: int) -> nn.Module:
        o = self.options
        last_norm = o.predictor_last_norm
        return ContrastHead(o.out, o.hidden, o.out, o.predictor_layers, bias=False, last_norm=last_norm)

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        queries, keys = queries_and_keys(self.name, student, teacher)
        return {"moco_v3/contrast": self.contrast(queries, keys)}

    def contrast(self, queries_VBD: Tensor, keys_VBD: Tensor) -> Tensor:
        """The loss of normalized queries and keys. The sum over both directions; for more views, twice the mean."""
        keys, first = gather_rows(keys_VBD)
        place = first + torch.arange(queries_VBD.shape[1], device=keys.device)
        pairs, temperature = ordered_pairs(len(keys)), self.options.temperature
        with torch.autocast(keys.device.type, enabled=False):
            losses = [cross_entropy(queries_VBD[q] @ keys[k].T / temperature, place) for q, k in pairs]
        return 2 * torch.stack(losses).mean() * 2 * temperature
