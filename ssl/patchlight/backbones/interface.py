"""What every backbone is: a module that turns images into patch tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import sentence
from ..records import Tokens

# What a backbone may have beyond patches, in words. The fields of an objective's Needs have the same names.
CAPABILITIES = {
    "class_token": "has a class token",
    "masks": "takes masks of hidden patches",
    "queries": "takes queries beside an image",
}


@dataclass(frozen=True, slots=True)
class MapLevel:
    """One of the feature maps that dense heads take from a backbone."""

    channels: int
    stride: int  # pixels between neighboring cells
    norm: bool = False  # whether such heads put a LayerNorm on it first, as published for this backbone


MAP_BLOCKS = (4, 6, 8, 12)  # of a ViT's 12 blocks those whose patches are its four maps, as iBOT and XCiT published


def map_blocks(depth: int, blocks: tuple[int, ...] = MAP_BLOCKS) -> tuple[int, ...]:
    """The numbers, from 0, of the same blocks in a ViT of another depth."""
    return tuple(max(1, round(depth * block / 12)) - 1 for block in blocks)


def as_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[M, N, D] patches as a map [M, D, rows, columns]."""
    return patches.transpose(1, 2).unflatten(2, grid)


class Backbone(nn.Module, ABC):
    """Turns images into patch tokens on a grid."""

    capabilities: frozenset[str]  # which of CAPABILITIES it has, or can have
    width: int  # D
    patch_size: int  # pixels between neighboring patches
    heads: int  # attention heads, also of a class-attention summary
    norm_eps: (
        float | None
    )  # of the final norm of its published weights; None where they have none that a summary must have
    blocks: nn.ModuleList | list[nn.Module]  # of several processes the engine compiles and shards each by itself
    returns_blocks = False  # whether forward's `layers` may be any block; others have patches after the last block only
    takes_sizes = False  # whether it has `forward_sizes`, which takes crops of several sizes at once
    has_class_token: bool  # whether Tokens.cls exists

    @property
    def has_final_norm(self) -> bool:
        """Whether Tokens.patches are after a norm of its own; if not, they are the raw residual stream. Ours have one exactly
        where they have a class token."""
        return self.has_class_token

    @abstractmethod
    def forward(self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W], mask [M, N] bool: True patches are hidden; layers: block numbers to return as well.

        With the capability "queries" it also takes `queries: Queries` and returns Tokens.queries. With a final norm it
        also takes `residual: bool` and returns the patches before that norm in Tokens.residual.
        """

    @property
    def map_levels(self) -> tuple[MapLevel, ...]:
        """What `maps` returns, finest first; strides may be equal. By default the patches alone."""
        return (MapLevel(self.width, self.patch_size),)

    def maps(self, pixels: Tensor, blocks: tuple[int, ...] = MAP_BLOCKS) -> tuple[Tensor, ...]:
        """Feature maps [M, C, rows, columns] for detection and segmentation, of pixels [M, 3, H, W].

        blocks: of a ViT of 12; other backbones do not read them.
        """
        tokens = self(pixels)
        return (as_map(tokens.patches, tokens.grid),)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of this many pixels."""
        size = self.patch_size
        if height % size or width % size or min(height, width) < size:
            rule = f"{type(self).__name__}: height and width must be multiples of the patch size {size}"
            raise ValueError(sentence(rule, f"{height}x{width}", "resize or crop the images"))
        return height // size, width // size

    def check_mask(self, mask: Tensor, images: int, patches: int) -> None:
        """A mask must have a bool for every patch."""
        if mask.shape != (images, patches) or mask.dtype != torch.bool:
            rule = f"{type(self).__name__}: mask must be bool of shape {(images, patches)} (images, patches)"
            got = f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ValueError(sentence(rule, got, "flatten its grid row by row"))
