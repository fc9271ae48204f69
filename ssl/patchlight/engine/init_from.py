"""Starts a student from published weights, and lists which tensors were loaded, reshaped, missing and unused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from ..backbones.positions import grid_positions
from ..backbones.published import MAY_LEAVE_OUT, MAY_START_ANEW, read_published, without_ones
from ..backbones.vit import resize_table
from ..checks import check
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
    """Copies backbone and summary from a published file; position tables are resampled to fit.

    The student then computes what the file's network does, or an error names the tensors that only one of them has.
    """
    published = read_published(path)
    wanted = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(NOT_WANTED)}
    fitted: dict[str, Tensor] = {}
    loaded: list[str] = []
    reshaped: list[str] = []
    left: list[str] = []
    for name, tensor in published.weights.items():
        target = _target(name, wanted)
        if target is None:
            left.append(name)
            continue
        fitted[target] = own = _fit(student, target, tensor, wanted[target].shape, path)
        same = tensor.shape == own.shape
        (loaded if same else reshaped).append(target if same else f"{target} {_shape(tensor)} to {_shape(own)}")
    missing = [name for name in wanted if name not in fitted]
    if not fitted:
        raise ValueError(
            f"A file must hold weights of this model, got none of its {len(wanted)} tensors in {path} ({published.layout}), "
            f"which has {sorted(published.weights)[:3]}; choose the Model.arch that it was made with."
        )
    _check_complete(left, missing, f"{path} ({published.layout})")
    for name, own in fitted.items():
        wanted[name].copy_(own)
    return Taken(path, published.layout, loaded, reshaped, missing, left + published.beside)


def _check_complete(left: list[str], missing: list[str], file: str) -> None:
    """A ValueError where the model would compute another function than the file's network."""
    foreign = [name for name in left if name != MAY_LEAVE_OUT]
    new = [name for name in missing if not MAY_START_ANEW.fullmatch(name)]
    parts = [f"{len(foreign)} of the file that it has no place for, such as {foreign[0]}"] if foreign else []
    parts += [f"{len(new)} of its own that the file lacks, such as {new[0]}"] if new else []
    remedy = "choose the Model.arch and Model.sizes that it was made with"
    if new == ["backbone.cls_token"]:
        remedy = 'set Model.summary to "mean" or "class_attention", which need no class token'
    rule = "The model must have all tensors of the file's network and no others"
    check(not parts, rule, f"{' and '.join(parts)}, in {file}", remedy)


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
    if without_ones(tensor.shape) == without_ones(shape):
        return tensor.reshape(shape)
    if name.endswith("relative_position_bias_table") and tensor.ndim == 2 and tensor.shape[1] == shape[1]:
        side = (math.isqrt(shape[0]) + 1) // 2
        if math.isqrt(len(tensor)) ** 2 == len(tensor) > 0:
            return resize_rel_pos_bias_table(tensor.float(), (side, side), tuple(shape))
    raise ValueError(
        f"Published weights must have the model's shapes, got {_shape(tensor)} for {name}, which is {tuple(shape)}, in "
        f"{path}; choose the Model.arch and patch_size that it was made with."
    )


def _fit_positions(student: Student, table: Tensor, shape: torch.Size, path: Path) -> Tensor:
    """Resampled to the model's grid. A class row that the model does not need is dropped; if the file has none, it is zero."""
    backbone: Any = student.backbone
    rows = table.shape[1] if table.ndim == 3 and table.shape[0] == 1 else 0
    side = math.isqrt(rows)
    if not side or shape[2] != table.shape[2] or side**2 not in (rows, rows - 1):
        raise ValueError(
            f"A position table must be of a square grid and as wide as the model, {shape[2]}, got {_shape(table)} in {path}; "
            "choose the Model.arch that it was made with."
        )
    classes, patches = table.float().split((rows - side**2, side**2), dim=1)
    if backbone.embed_positions is not None:  # a fixed table is never replaced, so the file must have the same
        own = backbone.embed_positions(grid_positions((side, side)), backbone.width)
        if not torch.allclose(patches[0], own.to(patches), atol=1e-3):
            raise ValueError(
                f"Model.positions keeps a fixed table, got another one in {path}; set it to the file's kind, or to 'learned'."
            )
        return backbone.pos_embed
    if backbone.table_grid != (side, side):
        patches = resize_table(patches, (side, side), backbone.table_grid, "size")
    if not backbone.has_class_token:
        return patches
    row = classes if classes.shape[1] else patches.new_zeros(1, 1, shape[2])  # none: as in DeiT III
    return torch.cat([row, patches], dim=1)


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape)
