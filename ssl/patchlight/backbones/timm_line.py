"""timm's name and options for an exported backbone, and the line of Python with which timm loads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# By width: the names that timm has, and what they stand for.
_VITS = {192: ("vit_tiny", 3), 384: ("vit_small", 6), 768: ("vit_base", 12), 1024: ("vit_large", 16)}
_DEPTHS = {"vit_large": 24}
_BOTTLENECKS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
}
_BASICS: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
_SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "swin_tiny",
    (96, (2, 2, 18, 2)): "swin_small",
    (128, (2, 2, 18, 2)): "swin_base",
}


def timm_name(shapes: Mapping[str, Sequence[int]], heads: int, image_size: int) -> tuple[str, dict[str, Any]]:
    """A timm model's name for weights of these shapes, and every option that it has otherwise.

    heads: attention heads of a vision transformer. image_size: of the global crops.
    """
    if "conv1.weight" in shapes:
        return _resnet(shapes)
    if "layers.0.blocks.0.norm1.weight" in shapes:
        return _swin(shapes, image_size)
    return _vit(shapes, heads)


def timm_line(shapes: Mapping[str, Sequence[int]], heads: int, image_size: int, path: Path | str) -> str:
    """timm.create_model(...) for a file of weights of these shapes; the rest as in `timm_name`."""
    name, options = timm_name(shapes, heads, image_size)
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    return f'timm.create_model("{name}"{given}, num_classes=0, checkpoint_path="{path}")'


def _vit(shapes: Mapping[str, Sequence[int]], heads: int) -> tuple[str, dict[str, Any]]:
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    class_token = "cls_token" in shapes
    size = math.isqrt(shapes["pos_embed"][1] - class_token) * patch
    name, usual_heads = _VITS.get(width, ("vit_tiny", 0))
    usual = {
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": next(w for w, (known, _) in _VITS.items() if known == name),
        "depth": _DEPTHS.get(name, 12),
        "num_heads": usual_heads,
        "mlp_ratio": 4.0,
    }
    here = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": _count(shapes, "blocks."),
        "num_heads": heads,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
    }
    options = _different(here, usual)
    if "blocks.0.attn.qkv.bias" not in shapes:
        options["qkv_bias"] = False
    if not class_token:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return f"{name}_patch16_224", options


def _swin(shapes: Mapping[str, Sequence[int]], image_size: int) -> tuple[str, dict[str, Any]]:
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    stages = range(_count(shapes, "layers."))
    tables = [shapes[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    depths = tuple(_count(shapes, f"layers.{i}.blocks.") for i in stages)
    name = _SWINS.get((width, depths), "swin_tiny")
    known, usual_depths = next(key for key, value in _SWINS.items() if value == name)
    usual = {"img_size": 224, "patch_size": 4, "embed_dim": known, "depths": usual_depths, "window_size": 7}
    here = {
        "img_size": image_size,
        "patch_size": patch,
        "embed_dim": width,
        "depths": depths,
        "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
    }
    usual["num_heads"] = tuple(known // 32 * 2**i for i in range(4))
    here["num_heads"] = tuple(table[1] for table in tables)
    return f"{name}_patch4_window7_224", _different(here, usual)


def _resnet(shapes: Mapping[str, Sequence[int]]) -> tuple[str, dict[str, Any]]:
    layers = tuple(_count(shapes, f"layer{stage}.") for stage in (1, 2, 3, 4))
    channels = tuple(shapes[f"layer{stage}.0.bn1.weight"][0] for stage in (1, 2, 3, 4))
    known = _BOTTLENECKS if "layer1.0.conv3.weight" in shapes else _BASICS
    name = known.get(layers, next(iter(known.values())))
    usual_layers = next(key for key, value in known.items() if value == name)
    here = {"layers": layers, "channels": channels}
    return name, _different(here, {"layers": usual_layers, "channels": (64, 128, 256, 512)})


def _different(here: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in here.items() if value != usual[name]}


def _count(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """How many different numbers follow the prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
