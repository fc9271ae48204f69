"""The encoder: a backbone of any library, how it summarizes an image, and the format of its input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..backbones.interface import MAP_BLOCKS, MapLevel
from ..backbones.vit import DropPath
from ..checks import check
from ..data.policy import IMAGENET_MEAN, IMAGENET_STD
from ..heads.summary import Summary
from ..records import Tokens

DROPS = ("drop_path", "drop_path1", "drop_path2")  # names of a block's stochastic depth in timm
IMAGE_SIZE = 224  # side of the images that all published networks were trained on


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

    image_size: int = IMAGE_SIZE  # side of the images that its position table was made for
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
    def heads(self) -> int: ...

    @property
    def has_class_token(self) -> bool: ...

    @property
    def blocks(self) -> Blocks: ...

    @property
    def returns_blocks(self) -> bool: ...

    @property
    def map_levels(self) -> tuple[MapLevel, ...]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def maps(self, pixels: Tensor, blocks: tuple[int, ...] = MAP_BLOCKS) -> tuple[Tensor, ...]: ...

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
        """After how many blocks its patches can be asked for: all of a ViT, only the last of others."""
        return len(self.backbone.blocks) if self.backbone.returns_blocks else 1

    @property
    def map_levels(self) -> tuple[MapLevel, ...]:
        return self.backbone.map_levels

    def maps(self, pixels: Tensor, blocks: tuple[int, ...] = MAP_BLOCKS) -> tuple[Tensor, ...]:
        """Feature maps for detection and segmentation, finest first, as `map_levels` describes them."""
        return self.backbone.maps(pixels, blocks)

    def forward(self, pixels: Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """pixels [M, 3, H, W] as `normalize` returns them, sides multiples of the patch size; layers: blocks to return, of
        which backbones with stages have the last alone."""
        self.check_layers(layers)
        of_blocks = layers if layers and self.backbone.returns_blocks else ()
        tokens = self.backbone(pixels, layers=of_blocks)
        if of_blocks:
            levels = tuple(self._level(x) for x in tokens.layers)
        else:
            levels = tuple(self._last_level(tokens) for _ in layers)
        summary: Summary = self.summary(tokens)
        return Encoded(summary.summary, summary.patches, tokens.grid, levels)

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """A ValueError for a block whose patches the backbone does not return."""
        if layers and not self.backbone.returns_blocks:
            others = [layer for layer in layers if layer != -1]
            rule = "Only a ViT has patches of one grid after every block; backbones with stages have those of the last"
            check(not others, rule, f"blocks {others} of {self.name}", "leave it out, or use -1")

    def _last_level(self, tokens: Tokens) -> Level:
        if tokens.cls is not None:
            return Level(tokens.cls, tokens.patches)
        return self._level(tokens.patches)

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
    """Gives the blocks of all stages rates that rise evenly from 0 to this one."""
    blocks = [block for block in backbone.modules() if any(hasattr(block, name) for name in DROPS)]
    rule, got = "Drop path needs a backbone of residual blocks, as ViT, Swin and ResNet have", type(backbone).__name__
    check(bool(blocks) or not rate, rule, f"{rate} for {got}", "set drop_path to 0")
    for number, block in enumerate(blocks):
        block_rate = rate * number / max(len(blocks) - 1, 1)
        for name in DROPS:
            if hasattr(block, name):
                setattr(block, name, DropPath(block_rate) if block_rate else nn.Identity())
