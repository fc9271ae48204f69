"""Position embeddings: fixed ones of sines and cosines, for any real x and y in patches, and tables resized to other grids."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check
from ..compiled import constant_when_compiled

BASE = 10000.0


def sincos(positions: Tensor, width: int) -> Tensor:
    """[..., 2] x (column), y (row) to [..., D]: sin x w_k, cos x w_k, sin y w_k, cos y w_k, w_k = 10000^(-k / (D/4)).

    The table of MAE, which the released code of PQCL uses.
    """
    check_width("sincos", width)
    quarter = width // 4
    exact = _exact(positions)
    w = BASE ** -(torch.arange(quarter, dtype=exact.dtype, device=exact.device) / quarter)
    angle = exact[..., None] * w  # [..., 2, D/4]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def sincos_rows_first(positions: Tensor, width: int) -> Tensor:
    """The same with y before x, as in MoCo v3."""
    return sincos(positions.flip(-1), width)


def sincos_printed(positions: Tensor, width: int) -> Tensor:
    """Eq. (4) of the PQCL paper literally: for x, then y, sin and cos alternate, the i-th of x / 10000^(2i/D).

    The paper says that it follows MAE, where sine and cosine share frequencies; in this equation they never do.
    """
    check_width("sincos_printed", width)
    exact = _exact(positions)
    exponent = 2 * torch.arange(1, width // 2 + 1, dtype=exact.dtype, device=exact.device) / width
    angle = exact[..., None] * BASE**-exponent  # [..., 2, D/2]
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-3)


EMBEDDINGS = {"sincos": sincos, "sincos_rows_first": sincos_rows_first, "sincos_printed": sincos_printed}


def grid_positions(grid: tuple[int, int]) -> Tensor:
    """[N, 2] x, y of every patch of a grid, row by row."""
    row, column = (torch.arange(side, dtype=torch.float64) for side in grid)
    y, x = torch.meshgrid(row, column, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def resize_table(table: Tensor, source: tuple[int, int], target: tuple[int, int], resize: str) -> Tensor:
    """A table [1, rows * columns, D] of one grid, resampled bicubically for another; resize as in VisionTransformer.

    As one product with a fixed matrix: on a GPU the gradient of `F.interpolate` depends on the order of its atomic sums.
    """
    exact = _exact(table)
    matrix = resize_matrix(source, target, resize, exact.dtype, exact.device)
    # The device "meta", on which FLOPs are counted, knows no autocast.
    with nullcontext() if table.is_meta else torch.autocast(table.device.type, enabled=False):
        return (matrix @ exact.squeeze(0)).unsqueeze(0).to(table.dtype)


@constant_when_compiled  # a compiled forward keeps the matrix as a constant
def resize_matrix(
    source: tuple[int, int], target: tuple[int, int], resize: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[target patches, source patches] of `resize_table`: computed and copied to the device once, before later steps."""
    # Fake tensors belong to the mode that made them, so those are not kept.
    kept = type(torch.empty(0, device=device)) is Tensor
    return (_resize_matrix if kept else _resize_matrix.__wrapped__)(source, target, resize, dtype, device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a later training step may use it
def _resize_matrix(
    source: tuple[int, int], target: tuple[int, int], resize: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The resize of each unit vector, computed on the host in fp64."""
    patches = source[0] * source[1]
    unit_tables = torch.eye(patches, dtype=torch.float64, device="cpu").view(patches, 1, *source)
    if resize == "released":
        scale = tuple((new + 0.1) / old for new, old in zip(target, source, strict=True))
        resized = F.interpolate(unit_tables, scale_factor=scale, mode="bicubic")
    else:
        resized = F.interpolate(unit_tables, size=target, mode="bicubic")
    return resized.flatten(1).T.contiguous().to(device, dtype)


def check_width(kind: str, width: int) -> None:
    rule = f"{kind} positions: the width must be a multiple of 4"
    check(width >= 4 and width % 4 == 0, rule, width, "change the width")


def _exact(positions: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is already."""
    return positions.to(torch.promote_types(positions.dtype, torch.float32))
