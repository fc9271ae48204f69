"""Starts a student from published weights, and lists which tensors were loaded, reshaped, missing and unused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from ..backbones.published import read_published
from ..backbones.vit import resize_table
from .branches import Student

NOT_WANTED = ("heads.", "predictors.")  # every objective has its own


@dataclass(frozen=True, slots=True)
class Taken:
    """Which tensors of the file and of the student were used, and which were not."""

    file: Path
    layout: str
    loaded: list[str]
    reshaped: list[str]  # with both shapes
    missing: list[str]  # of backbone and summary; they keep their initial values
    unused: list[str]  # of the file

    def table(self) -> Table:
        """A row per kind, with the first names."""
        table = Table("", "tensors", "such as", title=f"{self.file.name}: layout of {self.layout}")
        for kind in ("loaded", "reshaped", "missing", "unused"):
            names = getattr(self, kind)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            table.add_row(kind, str(len(names)), ", ".join(names[:8]) + more)
        return table


@torch.no_grad()
def init_from(student: Student, path: Path) -> Taken:
    """Copies backbone and summary from a published file; position tables are resampled to fit."""
    if not path.is_file():
        raise FileNotFoundError(
            f"Model.init_from must name a file of weights, got {path}, which is no file; check the path."
        )
    published = read_published(path)
    state = student.state_dict()
    wanted = {name: tensor for name, tensor in state.items() if not name.startswith(NOT_WANTED)}
    loaded: list[str] = []
    reshaped: list[str] = []
    unused: list[str] = []
    for name, tensor in published.weights.items():
        target = _target(name, wanted)
        if target is None:
            unused.append(name)
            continue
        fitted = _fit(student, target, tensor, wanted[target].shape, path)
        wanted[target].copy_(fitted)
        same = tensor.shape == fitted.shape
        (loaded if same else reshaped).append(target if same else f"{target} {_shape(tensor)} to {_shape(fitted)}")
    if not loaded and not reshaped:
        raise ValueError(
            f"A file must hold weights of this model, got none of its {len(wanted)} tensors in {path} ({published.layout}), "
            f"which has {sorted(published.weights)[:3]}; choose the Model.arch that it was made with."
        )
    taken = {entry.split(" ")[0] for entry in loaded + reshaped}
    missing = [name for name in wanted if name not in taken]
    return Taken(path, published.layout, loaded, reshaped, missing, unused)


def _target(name: str, wanted: dict[str, Tensor]) -> str | None:
    """The student's name of a published tensor. A final norm is loaded into the module that applies it."""
    rest = name.removeprefix("summary.")
    candidates = [name if name.startswith("summary.") else f"backbone.{name}"]
    if rest.startswith("norm."):
        candidates += [f"backbone.{rest}", f"summary.{rest}"]
    return next((candidate for candidate in candidates if candidate in wanted), None)


def _fit(student: Student, name: str, tensor: Tensor, shape: torch.Size, path: Path) -> Tensor:
    if name == "backbone.pos_embed":
        return _fit_positions(student, tensor, shape, path)
    if tensor.shape == shape:
        return tensor
    if tensor.numel() == shape.numel():
        return tensor.reshape(shape)
    if name.endswith("relative_position_bias_table"):
        side = (math.isqrt(shape[0]) + 1) // 2
        return resize_rel_pos_bias_table(tensor.float(), (side, side), tuple(shape))
    raise ValueError(
        f"Published weights must have the model's shapes, got {_shape(tensor)} for {name}, which is {tuple(shape)}, in "
        f"{path}; choose the Model.arch and patch_size that it was made with."
    )


def _fit_positions(student: Student, table: Tensor, shape: torch.Size, path: Path) -> Tensor:
    """Resampled to the model's grid. A class row that the model does not need is dropped; if the file has none, it is zero."""
    backbone: Any = student.backbone
    side = math.isqrt(table.shape[1])
    if shape[2] != table.shape[2] or side**2 not in (table.shape[1], table.shape[1] - 1):
        raise ValueError(
            f"A position table must be of a square grid and as wide as the model, {shape[2]}, got {_shape(table)} in {path}; "
            "choose the Model.arch that it was made with."
        )
    classes, patches = table.float().split((table.shape[1] - side**2, side**2), dim=1)
    if backbone.table_grid != (side, side):
        patches = resize_table(patches, (side, side), backbone.table_grid, "size")
    own = backbone.pos_embed
    if not (
        isinstance(own, nn.Parameter) and own.requires_grad
    ):  # a fixed table is never replaced, so the file must have the same
        if backbone.table_grid == (side, side) and not torch.allclose(patches, own[:, -(side**2) :], atol=1e-3):
            raise ValueError(
                f"Model.positions keeps a fixed table, got another one in {path}; set it to the file's kind, or to 'learned'."
            )
        return own
    if not backbone.has_class_token:
        return patches
    row = classes if classes.shape[1] else patches.new_zeros(1, 1, shape[2])
    return torch.cat([row, patches], dim=1)


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape)
