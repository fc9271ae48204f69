"""What a run asks of a backbone, and how one is built by name."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from ..records import Tokens
from . import vit


@runtime_checkable
class Backbone(Protocol):
    """A module that turns images into patch tokens on a grid."""

    width: int  # D
    patch_size: int  # pixels between neighboring patches
    heads: int  # attention heads, which a class-attention summary copies
    blocks: nn.ModuleList  # what the engine compiles and shards one by one
    has_class_token: bool  # whether Tokens.cls exists; if not, Tokens.patches are the raw residual stream

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of this many pixels."""
        ...

    def __call__(
        self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = (), residual: bool = False
    ) -> Tokens:
        """pixels [M, 3, H, W], mask [M, N] bool: True patches are hidden; layers: block numbers to return as well.

        residual: return the patches before the final norm too (the patches themselves where there is no such norm).
        """
        ...


def build_backbone(arch: str, **options) -> Backbone:
    """A backbone by name, as in build_backbone("vit_small", drop_path=0.1); options win over the sizes of its name."""
    if arch not in vit.ARCHITECTURES:
        raise ValueError(f"build_backbone: no backbone is called {arch!r}; choose from {sorted(vit.ARCHITECTURES)}.")
    return vit.VisionTransformer(**{**vit.ARCHITECTURES[arch], **options})
