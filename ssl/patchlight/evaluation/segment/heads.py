"""Heads that map levels of patch features [B, D, h, w] to class scores: 1x1, Semantic FPN, UPerNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [B, C, h, w] at another size, bilinear."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def resized_like(x: Tensor, other: Tensor) -> Tensor:
    """The same at the size of another map."""
    return resized(x, (other.shape[-2], other.shape[-1]))


def conv_unit(inside: int, outside: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class PointwiseHead(nn.Module):
    """A 1x1 convolution on the last level. With `norm`, features are standardized first, as frozen ones need."""

    def __init__(self, width: int, classes: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.classify = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        assert self.classify.bias is not None
        nn.init.zeros_(self.classify.bias)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        return (self.classify(self.norm(levels[-1])),)


class Pyramid(nn.Module):
    """Four levels of one ViT grid as a feature pyramid: 4 and 2 times finer by deconvolution, unchanged, and half as fine."""

    def __init__(self, width: int) -> None:
        super().__init__()
        up = lambda: nn.ConvTranspose2d(width, width, 2, stride=2)
        self.scales = nn.ModuleList(
            [
                nn.Sequential(up(), nn.BatchNorm2d(width), nn.GELU(), up()),
                up(),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [scale(level) for scale, level in zip(self.scales, levels, strict=True)]


class SemanticFpnHead(nn.Module):
    """Top-down fusion, each scale brought to the finest by convolutions and doublings, then summed (Kirillov et al. 2019)."""

    def __init__(self, width: int, classes: int, channels: int = 128) -> None:
        super().__init__()
        self.pyramid = Pyramid(width)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 2 * channels, 1) for _ in range(4))
        self.smooth = nn.ModuleList(nn.Conv2d(2 * channels, 2 * channels, 3, padding=1) for _ in range(4))
        self.up = nn.ModuleList(
            nn.ModuleList(conv_unit(2 * channels if i == 0 else channels, channels) for i in range(max(1, doublings)))
            for doublings in range(4)
        )
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, 1))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        scales = top_down([lateral(x) for lateral, x in zip(self.lateral, self.pyramid(levels), strict=True)])
        total: Tensor | float = 0.0
        for doublings, (smooth, units, x) in enumerate(zip(self.smooth, self.up, scales, strict=True)):
            assert isinstance(units, nn.ModuleList)
            x = smooth(x)
            for layer in units:
                x = layer(x)
                if doublings:
                    x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            total = total + (x if x.shape[-2:] == scales[0].shape[-2:] else resized_like(x, scales[0]))
        return (self.classify(total),)


class UperNetHead(nn.Module):
    """Pyramid pooling on the coarsest scale, top-down fusion, all scales side by side (Xiao et al. 2018), and a helper head.

    The second score map is the helper's, from the third level; it is part of the training loss only.
    """

    def __init__(self, width: int, classes: int, channels: int = 512, pools: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.pyramid = Pyramid(width)
        self.pools, self.pooled = pools, nn.ModuleList(conv_unit(width, channels, 1) for _ in pools)
        self.bottom = conv_unit(width + len(pools) * channels, channels)
        self.lateral = nn.ModuleList(conv_unit(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv_unit(channels, channels) for _ in range(3))
        self.fuse = conv_unit(4 * channels, channels)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, 1))
        half = max(1, channels // 2)
        self.helper = nn.Sequential(conv_unit(width, half), nn.Dropout2d(0.1), nn.Conv2d(half, classes, 1))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        scales = self.pyramid(levels)
        pooled = [
            resized_like(layer(F.adaptive_avg_pool2d(scales[3], n)), scales[3])
            for n, layer in zip(self.pools, self.pooled, strict=True)
        ]
        coarse = self.bottom(torch.cat([scales[3], *pooled], 1))
        fused = top_down([*(lateral(x) for lateral, x in zip(self.lateral, scales[:3], strict=True)), coarse])
        fused = [*(smooth(x) for smooth, x in zip(self.smooth, fused[:3], strict=True)), fused[3]]
        side_by_side = torch.cat([fused[0], *(resized_like(x, fused[0]) for x in fused[1:])], 1)
        return self.classify(self.fuse(side_by_side)), self.helper(scales[2])


def top_down(scales: list[Tensor]) -> list[Tensor]:
    """Adds each scale, enlarged, to the next finer one, from the coarsest on."""
    out = [scales[-1]]
    for finer in reversed(scales[:-1]):
        out.append(finer + resized_like(out[-1], finer))
    return out[::-1]
