"""The backbone of a file of weights alone: its sizes are read from the shapes of the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..backbones.interface import Backbone
from ..backbones.resnet import ResNet
from ..backbones.swin import STAGES, SwinTransformer
from ..backbones.vit import VisionTransformer
from ..checks import check, check_least, sentence
from .encoder import IMAGE_SIZE

Shapes = Mapping[str, tuple[int, ...]]
STEM = (64, 3, 7, 7)  # a ResNet's first convolution
EXPANSION = 4  # of a ResNet's bottleneck
SWIN_DEPTHS = (2, 2, 2)  # blocks of the first, second and fourth stage; that of the third is free


def build_from_shapes(weights: Mapping[str, Tensor], path: Path, heads: int | None = None) -> tuple[Backbone, int]:
    """A ResNet, Swin or plain ViT of the weights' shapes, and the side of the images to evaluate it on.

    heads: attention heads of a ViT, by default 64 channels each.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if "conv1.weight" in shapes:
        return _resnet(shapes, path), IMAGE_SIZE
    if any(name.startswith("layers.") for name in shapes):
        return _swin(shapes, path)
    return _plain_vit(shapes, path, heads), IMAGE_SIZE


def _resnet(shapes: Shapes, path: Path) -> ResNet:
    depths = tuple(_count(shapes, f"layer{stage}.") for stage in (1, 2, 3, 4))
    widths = [next(iter(shapes.get(f"layer{stage}.0.bn1.weight", ())), 0) for stage in (1, 2, 3, 4)]
    bottleneck = "layer1.0.conv3.weight" in shapes
    inner = shapes.get("layer1.0.conv2.weight", ())
    outer = next(iter(shapes.get("layer1.0.conv3.weight", ())), 0)
    others = {
        f"a stem of {shapes['conv1.weight']} (of ResNets twice as wide, for small images or of another kind)": (
            shapes["conv1.weight"] != STEM
        ),
        "grouped convolutions (ResNeXt)": len(inner) == 4 and inner[0] != inner[1],
        "wide bottlenecks (Wide ResNet)": bottleneck and outer != EXPANSION * widths[0],
    }
    got = " and ".join(part for part, found in others.items() if found)
    rule, remedy = "A ResNet's file must be of the plain ResNet-18, 34, 50, 101 or 152", "pass timm's name of the model"
    check(not got, rule, f"{got} in {path}", remedy)
    regular = 0 not in depths and widths[0] > 0 and widths == [widths[0] * 2**stage for stage in range(4)]
    check(regular, rule, f"stages of {depths} blocks with {widths} channels in {path}", remedy)
    return ResNet(bottleneck, (depths[0], depths[1], depths[2], depths[3]), widths[0])


def _swin(shapes: Shapes, path: Path) -> tuple[SwinTransformer, int]:
    """Its last stage is one window, as published: so the image's size is known."""
    stages = range(_count(shapes, "layers."))
    depths = tuple(_count(shapes, f"layers.{stage}.blocks.") for stage in stages)
    tables = [shapes.get(f"layers.{stage}.blocks.0.attn.relative_position_bias_table", ()) for stage in stages]
    kernel = shapes.get("patch_embed.proj.weight", ())
    regular = len(depths) == STAGES and (*depths[:2], depths[3]) == SWIN_DEPTHS and depths[2] > 0
    regular = regular and len(kernel) == 4 and 0 not in kernel
    regular = regular and all(len(table) == 2 and 0 not in table and math.isqrt(table[0]) % 2 for table in tables)
    rule = "A Swin's file must have four stages of 2, 2, any number and 2 blocks, with a table of positions each"
    got = f"{depths} blocks, patches {kernel or 'none'} and tables {tables} in {path}"
    check(regular, rule, got, "pass timm's name of the model")
    width, _, patch, _ = kernel
    heads = tables[0][1]
    check(
        width % heads == 0, "A Swin's heads must divide its width", f"{heads} and {width} in {path}", "repair the file"
    )
    window, last = ((math.isqrt(tables[stage][0]) + 1) // 2 for stage in (0, -1))
    size = patch * 2 ** (STAGES - 1)
    return SwinTransformer(width, depths[2], width // heads, window, size, last * size), last * size


def _plain_vit(shapes: Shapes, path: Path, heads: int | None) -> VisionTransformer:
    table, kernel = shapes.get("pos_embed", ()), shapes.get("patch_embed.proj.weight", ())
    depth = _count(shapes, "blocks.")
    class_token = "cls_token" in shapes
    positions = table[1] - class_token if len(table) == 3 else 0
    side = math.isqrt(max(0, positions))
    if not depth or not side or side**2 != positions or len(kernel) != 4 or 0 in kernel:
        rule = (
            "A file of weights without a run must be of a ResNet, a Swin, or a plain ViT with a square position table"
        )
        got = f"{depth} blocks, {table or 'no'} table and patches {kernel or 'none'} in {path}"
        remedy = "pass timm's name of the model, or a run of this library that started with them (Model.init_from)"
        raise ValueError(sentence(rule, got, remedy))
    width, _, patch, _ = kernel
    if heads is None:
        heads, rest = divmod(width, 64)
        if rest:
            rule = "The number of attention heads must be given where 64 does not divide the width"
            raise ValueError(sentence(rule, f"width {width}, which 64 does not divide, in {path}", "pass heads"))
    check_least("The number of attention heads", heads, 1, "leave it out for 64 channels each")
    first = shapes.get("blocks.0.mlp.fc1.weight", (4 * width,))
    return VisionTransformer(width, depth, heads, patch, side * patch, (first or (0,))[0] / width, class_token)


def _count(shapes: Shapes, prefix: str) -> int:
    """How many different numbers follow the prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
