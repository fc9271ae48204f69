"""Backbones that were never trained, as a checkpoint: random:vit_small, or smaller: random:vit_tiny,depth=2,width=64,heads=2."""

from __future__ import annotations

import torch

from ..backbones.architectures import build_backbone, capabilities_of
from ..checks import check
from ..heads.summary import build_summary
from .encoder import IMAGE_SIZE, Encoder, InputFormat

RANDOM = "random:"
SEED = 0
SIZES = ("width", "depth", "heads", "stem_width", "head_width", "window", "patch_size", "image_size")


def open_random(name: str, heads: int | None = None) -> Encoder:
    """The backbone, freshly initialized by seed 0. Its summary is the class token, or the mean where there is none.

    heads: of a ViT, as if they were among the sizes.
    """
    arch, *words = name.removeprefix(RANDOM).split(",")
    sizes = {} if heads is None else {"heads": heads}
    for word in words:
        key, _, value = word.partition("=")
        known = key in SIZES and value.isdecimal() and int(value) > 0
        rule = f"A checkpoint at random is random: with an architecture, then sizes: {', '.join(SIZES)}"
        check(known, rule, f"{word!r} in {name}", "as in random:vit_tiny,depth=2,width=64,heads=2")
        sizes[key] = int(value)
    kind = "cls" if "class_token" in capabilities_of(arch) else "mean"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        backbone = build_backbone(arch, **sizes)
        summary = build_summary(kind, backbone)
    notes = (f"freshly initialized with seed {SEED}: nothing was learned",)
    return Encoder(backbone, summary, name, InputFormat(sizes.get("image_size", IMAGE_SIZE)), notes)
