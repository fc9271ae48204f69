"""The encoder: a backbone of any library, how it summarizes an image, and the format of its input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..backbones.interface import MapLevel
from ..backbones.vit import DropPath
from ..data.policy import IMAGENET_MEAN, IMAGENET_STD
from ..heads.summary import Summary
from ..records import Tokens


@dataclass(frozen=True, slots=True)
class Level:
    """Features of M images after one block and the final norm."""

    summary: Tensor  # [M, D] the class token, or the mean of the patches where there is none
    patches: Tensor  # [M, N, D]


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoder's features of M images."""

    summary: Tensor  # [M, D] one vector per image, as the checkpoint's own method makes it
    patches: Tensor  # [M, N, D] after the final norm, no class token
    grid: tuple[int, int]  # rows, columns; rows * columns = N
    levels: tuple[Level, ...]  # of the requested blocks


@dataclass(frozen=True, slots=True)
class InputFormat:
    """Size and normalization of the images that a backbone was trained on."""

    image_size: int = 224  # side of the images that its position table was made for
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class Blocks(Protocol):
    """Modules in a row: an nn.ModuleList, an nn.Sequential or any sequence."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[nn.Module]: ...

    def __getitem__(self, index: int, /) -> nn.Module: ...


class EvaluatedBackbone(Protocol):
    """What evaluation needs of a backbone, which is less than training needs."""

    @property
    def width(self) -> int: ...

    @property
    def patch_size(self) -> int: ...

    @property
    def has_class_token(self) -> bool: ...

    @property
    def blocks(self) -> Blocks: ...

    @property
    def map_levels(self) -> tuple[MapLevel, ...]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def maps(self, pixels: Tensor) -> tuple[Tensor, ...]: ...

    def __call__(self, pixels: Tensor, *, layers: tuple[int, ...] = ()) -> Tokens: ...


class Encoder(nn.Module):
    """A backbone with its summary and its input format, and where they come from."""

    backbone: EvaluatedBackbone

    def __init__(
        self,
        backbone: EvaluatedBackbone,
        summary: nn.Module,
        name: str,
        input_format: InputFormat,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.backbone, self.summary = backbone, summary
        self.name, self.input_format, self.notes = name, input_format, notes

    @property
    def width(self) -> int:
        return self.backbone.width

    @property
    def patch_size(self) -> int:
        return self.backbone.patch_size

    @property
    def depth(self) -> int:
        return len(self.backbone.blocks)

    @property
    def map_levels(self) -> tuple[MapLevel, ...]:
        return self.backbone.map_levels

    def maps(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Feature maps for detection and segmentation, finest first, as `map_levels` describes them."""
        return self.backbone.maps(pixels)

    def forward(self, pixels: Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """pixels [M, 3, H, W] as `normalize` returns them, sides multiples of the patch size; layers: blocks to return."""
        tokens = self.backbone(pixels, layers=layers)
        summary: Summary = self.summary(tokens)
        return Encoded(summary.summary, summary.patches, tokens.grid, tuple(self._level(x) for x in tokens.layers))

    def _level(self, x: Tensor) -> Level:
        """A block's tokens [M, N (+1), D]."""
        if self.backbone.has_class_token:
            return Level(x[:, 0], x[:, 1:])
        patches = getattr(self.summary, "norm", nn.Identity())(x)
        return Level(patches.mean(1), patches)

    def normalize(self, images: Tensor) -> Tensor:
        """Images [..., 3, H, W] uint8, or floats in 0..255, to pixels."""
        mean, std = (
            torch.tensor(channels, device=images.device)[:, None, None] * 255
            for channels in (self.input_format.mean, self.input_format.std)
        )
        return (images - mean) / std


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The format of a forward pass: fp32 or bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def set_drop_path(backbone: EvaluatedBackbone, rate: float) -> None:
    """Gives the blocks of a ViT rates that rise evenly from 0 to this one; other backbones have no such rates."""
    depth = len(backbone.blocks)
    for number, block in enumerate(backbone.blocks):
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                block_rate = rate * number / max(depth - 1, 1)
                setattr(block, name, DropPath(block_rate) if block_rate else nn.Identity())
