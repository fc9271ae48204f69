"""Fixed sin-cos positions in the plane: any real x and y, in patches, to an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def sincos(positions: Tensor, width: int) -> Tensor:
    """[..., 2] x (column), y (row) to [..., D]: sin x w_k, cos x w_k, sin y w_k, cos y w_k, w_k = 10000^(-k / (D/4)).

    MAE's table, which PQCL's released code takes.
    """
    check_width("sincos", width)
    quarter = width // 4
    exact = _exact(positions)
    w = BASE ** -(torch.arange(quarter, dtype=exact.dtype, device=exact.device) / quarter)
    angle = exact[..., None] * w  # [..., 2, D/4]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def sincos_rows_first(positions: Tensor, width: int) -> Tensor:
    """The same with y before x, as MoCo v3 has it."""
    return sincos(positions.flip(-1), width)


def sincos_printed(positions: Tensor, width: int) -> Tensor:
    """Eq. (4) of the PQCL paper to the letter: for x, then y, sin and cos by turns, the i-th of x / 10000^(2i/D).

    Unlike MAE's, which the paper says it follows, sine and cosine never share a frequency.
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


def check_width(kind: str, width: int) -> None:
    if width < 4 or width % 4:
        raise ValueError(f"{kind} positions: the width must be a multiple of 4, got {width}; change the width.")


def _exact(positions: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is already."""
    return positions.to(torch.promote_types(positions.dtype, torch.float32))
