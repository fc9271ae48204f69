"""A backbone's feature maps as a pyramid of four maps, each half as fine as the one before: strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..backbones.interface import MapLevel
from ..checks import check

STRIDES = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """Maps of four strides from four maps. Stages of a Swin or a ResNet have them; a ViT's grid is made finer by deconvolution
    and coarser by pooling, as iBOT and XCiT published.

    levels: the maps that it takes, as `Backbone.map_levels` has them. channels: of the maps that it returns.
    """

    def __init__(self, levels: Sequence[MapLevel]) -> None:
        super().__init__()
        rule = "Detection and segmentation heads need a backbone with four feature maps, as ViT, Swin and ResNet have"
        check(len(levels) == 4, rule, len(levels), "use one of these, or the linear and conv heads of segment")
        self.channels = tuple(level.channels for level in levels)
        self.norms = nn.ModuleList(_MapNorm(level.channels) if level.norm else nn.Identity() for level in levels)
        self.scales = nn.ModuleList(
            _scale(level.channels, level.stride, stride) for level, stride in zip(levels, STRIDES, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        parts = zip(self.scales, self.norms, maps, strict=True)
        return [scale(norm(x)) for scale, norm, x in parts]


def _scale(channels: int, given: int, wanted: int) -> nn.Module:
    """Doublings by deconvolution, with a BatchNorm and a GELU between them, or one pooling."""
    if given <= wanted:
        rule, remedy = "Maps of a backbone must have strides that divide 4, 8, 16 or 32", "use patches of 8 or 16"
        check(wanted % given == 0, rule, given, remedy)
        factor = wanted // given
        return nn.Identity() if factor == 1 else nn.MaxPool2d(factor, ceil_mode=True)
    doublings = (given // wanted).bit_length() - 1
    check(
        wanted << doublings == given, "Patches must be a power of two for dense heads", given, "use patches of 8 or 16"
    )
    layers: list[nn.Module] = []
    for number in range(doublings):
        if number:
            layers += [nn.BatchNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels, 2, stride=2))
    return nn.Sequential(*layers)


class _MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [M, C, rows, columns]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
