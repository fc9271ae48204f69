"""Heads that turn feature maps [B, C, rows, columns] into class scores: 1x1, Semantic FPN, UPerNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backbones.interface import MapLevel
from ..pyramid import Pyramid
from .features import has_one_grid


def resized(x: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """A map [B, C, h, w] at another size."""
    return F.interpolate(x, size=size, mode=mode, align_corners=False if mode == "bilinear" else None)


def resized_like(x: Tensor, other: Tensor, mode: str = "bilinear") -> Tensor:
    """The same at the size of another map."""
    size = (other.shape[-2], other.shape[-1])
    return x if x.shape[-2:] == size else resized(x, size, mode)


def conv_unit(inside: int, outside: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


def classifier(width: int, classes: int, std: float = 0.01) -> nn.Conv2d:
    """A 1x1 convolution to class scores that starts near 0."""
    conv = nn.Conv2d(width, classes, 1)
    nn.init.normal_(conv.weight, std=std)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class PointwiseHead(nn.Module):
    """A 1x1 convolution on the last map. With `norm`, features are standardized first, as frozen ones need."""

    def __init__(self, width: int, classes: int, norm: bool, std: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.classify = classifier(width, classes, std)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        return (self.classify(self.norm(maps[-1])),)


class _AsTheyAre(nn.Module):
    """Four maps of one grid, unchanged."""

    def __init__(self, levels: Sequence[MapLevel]) -> None:
        super().__init__()
        self.channels = tuple(level.channels for level in levels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return maps


class SemanticFpnHead(nn.Module):
    """Top-down fusion, each scale brought to the finest by convolutions and doublings, then summed (Kirillov et al. 2019).

    pyramid: whether a ViT's maps are made finer and coarser. If not, all stay on one grid, as SelfPatch released it.
    """

    def __init__(self, levels: Sequence[MapLevel], classes: int, channels: int = 128, pyramid: bool = True) -> None:
        super().__init__()
        self.pyramid = _AsTheyAre(levels) if has_one_grid(levels) and not pyramid else Pyramid(levels)
        wide = 2 * channels
        self.lateral = nn.ModuleList(nn.Conv2d(width, wide, 1) for width in self.pyramid.channels)
        self.smooth = nn.ModuleList(nn.Conv2d(wide, wide, 3, padding=1) for _ in range(4))
        for conv in (*self.lateral, *self.smooth):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.up = nn.ModuleList(
            nn.ModuleList(conv_unit(wide if i == 0 else channels, channels) for i in range(max(1, doublings)))
            for doublings in range(4)
        )
        self.classify = nn.Sequential(nn.Dropout2d(0.1), classifier(channels, classes))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        scales = top_down([lateral(x) for lateral, x in zip(self.lateral, self.pyramid(maps), strict=True)], "nearest")
        total: Tensor | float = 0.0
        for doublings, (smooth, units, x) in enumerate(zip(self.smooth, self.up, scales, strict=True)):
            assert isinstance(units, nn.ModuleList)
            x = smooth(x)
            for layer in units:
                x = layer(x)
                if doublings:
                    x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            total = total + resized_like(x, scales[0])
        return (self.classify(total),)


class UperNetHead(nn.Module):
    """Pyramid pooling on the coarsest scale, top-down fusion, all scales side by side (Xiao et al. 2018), and a helper head.

    The second score map is the helper's, from the third level; it is part of the training loss only.
    """

    def __init__(
        self,
        levels: Sequence[MapLevel],
        classes: int,
        channels: int = 512,
        helper_channels: int = 256,
        pools: tuple[int, ...] = (1, 2, 3, 6),
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(levels)
        *finer, third, last = self.pyramid.channels
        self.pools, self.pooled = pools, nn.ModuleList(conv_unit(last, channels, 1) for _ in pools)
        self.bottom = conv_unit(last + len(pools) * channels, channels)
        self.lateral = nn.ModuleList(conv_unit(width, channels, 1) for width in (*finer, third))
        self.smooth = nn.ModuleList(conv_unit(channels, channels) for _ in range(3))
        self.fuse = conv_unit(4 * channels, channels)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), classifier(channels, classes))
        self.helper = nn.Sequential(
            conv_unit(third, helper_channels), nn.Dropout2d(0.1), classifier(helper_channels, classes)
        )

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        scales = self.pyramid(maps)
        pooled = [
            resized_like(layer(F.adaptive_avg_pool2d(scales[3], n)), scales[3])
            for n, layer in zip(self.pools, self.pooled, strict=True)
        ]
        coarse = self.bottom(torch.cat([scales[3], *pooled], 1))
        fused = top_down([*(lateral(x) for lateral, x in zip(self.lateral, scales[:3], strict=True)), coarse])
        fused = [*(smooth(x) for smooth, x in zip(self.smooth, fused[:3], strict=True)), fused[3]]
        side_by_side = torch.cat([fused[0], *(resized_like(x, fused[0]) for x in fused[1:])], 1)
        scores = self.classify(self.fuse(side_by_side))
        return (scores, self.helper(scales[2])) if self.training else (scores,)


def top_down(scales: list[Tensor], mode: str = "bilinear") -> list[Tensor]:
    """Adds each scale, enlarged, to the next finer one, from the coarsest on."""
    out = [scales[-1]]
    for finer in reversed(scales[:-1]):
        out.append(finer + resized_like(out[-1], finer, mode))
    return out[::-1]
