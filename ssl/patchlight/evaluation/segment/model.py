"""An encoder with a segmentation head, and its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.interface import MAP_BLOCKS
from ..encoder import Encoder
from ..ranks import Ranks
from .features import features_of
from .heads import resized
from .scenes import IGNORE


class Segmenter(nn.Module):
    """An encoder and a head. features: what the head takes, one of the words in `features.py`; blocks: of a ViT of 12."""

    def __init__(self, encoder: Encoder, head: nn.Module, features: str, blocks: tuple[int, ...] = MAP_BLOCKS) -> None:
        super().__init__()
        self.encoder, self.head, self.features, self.blocks = encoder, head, features, blocks

    def forward(self, pixels: Tensor, frozen: bool = False) -> tuple[Tensor, ...]:
        """Score maps [B, C, h, w] of any resolution for pixels [B, 3, H, W]; sides are padded to whole patches."""
        patch = self.encoder.patch_size
        pixels = F.pad(pixels, (0, -pixels.shape[-1] % patch, 0, -pixels.shape[-2] % patch))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            maps = features_of(self.encoder, pixels, self.features, self.blocks)
        return self.head(maps)

    def others(self) -> nn.ModuleList:
        """The modules outside the backbone."""
        return nn.ModuleList([self.encoder.summary, self.head])


def segmentation_loss(maps: tuple[Tensor, ...], classes: Tensor, ranks: Ranks) -> Tensor:
    """Cross-entropy of the first map at full size, plus 0.4 of that of helper maps; 0 if no pixel has a class.

    Its mean over ranks is the mean over the known pixels of all ranks.
    """
    height, width = classes.shape[-2:]
    losses = [
        F.cross_entropy(resized(m.float(), (height, width)), classes, ignore_index=IGNORE, reduction="sum")
        for m in maps
    ]
    known = ranks.sum((classes != IGNORE).sum()) / ranks.world
    return (losses[0] + 0.4 * sum(losses[1:])) / known.clamp_min(1 / ranks.world)
