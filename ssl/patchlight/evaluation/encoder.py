"""A frozen look at a backbone: what evaluation asks of it, whichever library built it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbones.vit import DropPath
from ..data.policy import IMAGENET_MEAN, IMAGENET_STD
from ..heads.summary import Summary


@dataclass(frozen=True, slots=True)
class Level:
    """What one block says of M images, through the final norm."""

    summary: Tensor  # [M, D] its class token, or the mean of its patches where there is none
    patches: Tensor  # [M, N, D]


@dataclass(frozen=True, slots=True)
class Encoded:
    """M images as an encoder sees them."""

    summary: Tensor  # [M, D] one vector per image, as the checkpoint's own method makes it
    patches: Tensor  # [M, N, D] after the final norm, no class token
    grid: tuple[int, int]  # rows, columns; rows * columns = N
    levels: tuple[Level, ...]  # of the blocks asked for


@dataclass(frozen=True, slots=True)
class Eyes:
    """How images reach a backbone."""

    image_size: int = 224  # side of the images that its position table is made for
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class Encoder(nn.Module):
    """A backbone, how it sums up an image, and where it comes from."""

    def __init__(self, backbone: nn.Module, summary: nn.Module, name: str, eyes: Eyes, notes: tuple[str, ...] = ()):
        super().__init__()
        self.backbone, self.summary = backbone, summary
        self.name, self.eyes, self.notes = name, eyes, notes

    @property
    def width(self) -> int:
        return self.backbone.width

    @property
    def patch_size(self) -> int:
        return self.backbone.patch_size

    @property
    def depth(self) -> int:
        return len(self.backbone.blocks)

    def forward(self, pixels: Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """pixels [M, 3, H, W] normalized with `eyes`, sides multiples of the patch size; layers: blocks to return."""
        tokens = self.backbone(pixels, layers=layers)
        seen: Summary = self.summary(tokens)
        return Encoded(seen.summary, seen.patches, tokens.grid, tuple(self._level(x) for x in tokens.layers))

    def _level(self, x: Tensor) -> Level:
        """A block's tokens [M, N (+1), D]."""
        if self.backbone.has_class_token:
            return Level(x[:, 0], x[:, 1:])
        patches = getattr(self.summary, "norm", nn.Identity())(x)
        return Level(patches.mean(1), patches)

    def normalize(self, images: Tensor) -> Tensor:
        """Images [..., 3, H, W] uint8, or floats in 0..255, to pixels."""
        mean, std = (
            torch.tensor(c, device=images.device)[:, None, None] * 255 for c in (self.eyes.mean, self.eyes.std)
        )
        return (images - mean) / std


def set_drop_path(backbone: nn.Module, rate: float) -> None:
    """Gives the blocks of a ViT rates that rise evenly from 0 to this; other backbones have none."""
    depth = len(backbone.blocks)
    for number, block in enumerate(backbone.blocks):
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                own = rate * number / max(depth - 1, 1)
                setattr(block, name, DropPath(own) if own else nn.Identity())
