"""What segmentation heads take of an encoder: its patches, or its maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...backbones.interface import MAP_BLOCKS, MapLevel, as_map, map_blocks
from ..encoder import Encoder

PATCHES = "patches"  # the last ones, after the final norm
MAPS = "maps"  # those of `Encoder.maps`
NORMED_MAPS = "normed maps"  # the same, of a ViT after its final norm


def has_one_grid(levels: Sequence[MapLevel]) -> bool:
    """Whether these are four maps of one stride, as a ViT has them."""
    return len(levels) == 4 and len({(level.channels, level.stride) for level in levels}) == 1


def features_of(encoder: Encoder, pixels: Tensor, kind: str, blocks: tuple[int, ...] = MAP_BLOCKS) -> list[Tensor]:
    """Maps [B, C, rows, columns], finest first, of pixels whose sides are multiples of the patch size. blocks: of a ViT of 12."""
    if kind == PATCHES:
        encoded = encoder(pixels)
        return [as_map(encoded.patches, encoded.grid)]
    if kind == NORMED_MAPS and has_one_grid(encoder.map_levels):
        encoded = encoder(pixels, map_blocks(encoder.depth, blocks))
        return [as_map(level.patches, encoded.grid) for level in encoded.levels]
    return list(encoder.maps(pixels, blocks))
