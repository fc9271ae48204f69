"""Brings published tensors into the shapes of a backbone: tables of positions are resampled for its grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from ..checks import check, sentence
from .positions import grid_positions, resize_table
from .published import without_ones


def fit_weight(backbone: Any, name: str, tensor: Tensor, shape: torch.Size, path: Path) -> Tensor:
    """A published tensor in the shape that the model has, `name` being the model's."""
    if name == "backbone.pos_embed":
        return _fit_positions(backbone, tensor, shape, path)
    if without_ones(tensor.shape) == without_ones(shape):
        return tensor.reshape(shape)
    if name.endswith("relative_position_bias_table") and tensor.ndim == 2 and tensor.shape[1] == shape[1]:
        side = (math.isqrt(shape[0]) + 1) // 2
        if math.isqrt(len(tensor)) ** 2 == len(tensor) > 0:
            return resize_rel_pos_bias_table(tensor.float(), (side, side), tuple(shape))
    rule, got = (
        "Published weights must have the model's shapes",
        f"{shape_text(tensor)} for {name}, which is {tuple(shape)}",
    )
    raise ValueError(sentence(rule, f"{got}, in {path}", "choose the Model.arch and patch_size that it was made with"))


def _fit_positions(backbone: Any, table: Tensor, shape: torch.Size, path: Path) -> Tensor:
    """Resampled to the model's grid. A class row that the model does not need is dropped; if the file has none, it is zero."""
    rows = table.shape[1] if table.ndim == 3 and table.shape[0] == 1 else 0
    side = math.isqrt(rows)
    fits = side > 0 and shape[2] == table.shape[2] and side**2 in (rows, rows - 1)
    rule = f"A position table must be of a square grid and as wide as the model, {shape[2]}"
    check(fits, rule, f"{shape_text(table)} in {path}", "choose the Model.arch that it was made with")
    classes, patches = table.float().split((rows - side**2, side**2), dim=1)
    if backbone.embed_positions is not None:  # a fixed table is never replaced, so the file must have the same
        own = backbone.embed_positions(grid_positions((side, side)), backbone.width)
        same = torch.allclose(patches[0], own.to(patches), atol=1e-3)
        remedy = "set it to the file's kind, or to 'learned'"
        check(same, "Model.positions keeps a fixed table", f"another one in {path}", remedy)
        return backbone.pos_embed
    if backbone.table_grid != (side, side):
        patches = resize_table(patches, (side, side), backbone.table_grid, "size")
    if not backbone.has_class_token:
        return patches
    row = classes if classes.shape[1] else patches.new_zeros(1, 1, shape[2])  # none: as in DeiT III
    return torch.cat([row, patches], dim=1)


def shape_text(tensor: Tensor) -> str:
    """A shape such as 1x197x384."""
    return "x".join(str(side) for side in tensor.shape)
