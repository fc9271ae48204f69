"""The backbones by name."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from ..checks import check, check_choice
from . import resnet, swin, vit
from .interface import Backbone

ARCHITECTURES: dict[str, tuple[type[Backbone], Mapping[str, Any]]] = {
    **{arch: (vit.VisionTransformer, sizes) for arch, sizes in vit.ARCHITECTURES.items()},
    **{arch: (swin.SwinTransformer, sizes) for arch, sizes in swin.ARCHITECTURES.items()},
    **{arch: (resnet.ResNet, sizes) for arch, sizes in resnet.ARCHITECTURES.items()},
}


def capabilities_of(arch: str) -> frozenset[str]:
    """The capabilities of the backbone of this name, without building it."""
    return _architecture(arch)[0].capabilities


def build_backbone(arch: str, **options) -> Backbone:
    """A backbone by name, as in build_backbone("vit_small", drop_path=0.1); options override the sizes of its name."""
    kind, sizes = _architecture(arch)
    known = signature(kind).parameters
    unknown = {name: value for name, value in options.items() if name not in known}
    check(not unknown, f"build_backbone: {arch} takes {sorted(known)}", unknown, "leave these at their defaults")
    return kind(**{**sizes, **options})


def _architecture(arch: str) -> tuple[type[Backbone], Mapping[str, Any]]:
    check_choice("build_backbone: arch", arch, sorted(ARCHITECTURES))
    return ARCHITECTURES[arch]
