"""What a run asks of a backbone, and how one is built by name."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from ..records import Tokens
from . import resnet, swin, vit

ARCHITECTURES = {
    **{arch: (vit.VisionTransformer, sizes) for arch, sizes in vit.ARCHITECTURES.items()},
    **{arch: (swin.SwinTransformer, sizes) for arch, sizes in swin.ARCHITECTURES.items()},
    **{arch: (resnet.ResNet, sizes) for arch, sizes in resnet.ARCHITECTURES.items()},
}
# What a backbone may offer beyond patches, in words. An objective's Needs asks by the same names.
FEATURES = {
    "class_token": "has a class token",
    "masks": "can look at an image with hidden patches",
    "queries": "can carry queries beside an image",
}


@runtime_checkable
class Backbone(Protocol):
    """A module that turns images into patch tokens on a grid."""

    offers: frozenset[str]  # which of FEATURES it can do
    width: int  # D
    patch_size: int  # pixels between neighboring patches
    heads: int  # attention heads, which a class-attention summary copies
    norm_eps: float | None  # of the final norm that its published weights have; None where they have none
    blocks: Sequence[nn.Module]  # what the engine compiles and shards one by one
    has_class_token: bool  # whether Tokens.cls exists; if not, Tokens.patches are the raw residual stream

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of this many pixels."""
        ...

    def __call__(self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W], mask [M, N] bool: True patches are hidden; layers: block numbers to return as well.

        One that can carry queries (PQCL) takes `queries: Queries` too, and answers in Tokens.queries. One with a class
        token takes `residual: bool` too, and answers with the patches before its final norm in Tokens.residual.
        """
        ...


def offers_of(arch: str) -> frozenset[str]:
    """What the backbone of this name can do, without building it."""
    return _architecture(arch)[0].offers


def build_backbone(arch: str, **options) -> Backbone:
    """A backbone by name, as in build_backbone("vit_small", drop_path=0.1); options win over the sizes of its name."""
    kind, sizes = _architecture(arch)
    known = signature(kind).parameters
    unknown = {name: value for name, value in options.items() if name not in known}
    if unknown:
        raise ValueError(f"build_backbone: {arch} takes {sorted(known)}, got {unknown}; leave these at their defaults.")
    return kind(**{**sizes, **options})


def _architecture(arch: str) -> tuple[type, dict[str, int]]:
    if arch not in ARCHITECTURES:
        raise ValueError(f"build_backbone: no backbone is called {arch!r}; choose from {sorted(ARCHITECTURES)}.")
    return ARCHITECTURES[arch]
