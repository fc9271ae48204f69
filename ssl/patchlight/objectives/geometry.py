"""Where crops of one image lie relative to each other: pure functions of boxes and flips."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import Crops

ANCHORS = ("corner", "center")


def relative_positions(
    queries: Crops,
    crops: Crops,
    query_grid: tuple[int, int],
    grid: tuple[int, int],
    flip_aware: bool = True,
    anchor: str = "corner",
) -> Tensor:
    """[V, B, L * n, 2] x, y of every patch of L query crops in the patch units of each of V crops, as both are displayed.

    Query crop after query crop, row by row. Any real number: negative or beyond the grid where the query crop sticks
    out. A patch of the crop itself has its column and row.

    flip_aware: True takes account of both crops' mirrors; False ignores them, as PQCL's released code does.
    anchor: "corner", the patch's top left one, as PQCL is released and written. "center": the patch's center less
        half a unit; the same for a patch of the crop itself, and without the corner's bias for smaller ones.
    """
    if anchor not in ANCHORS:
        raise ValueError(f"relative_positions: anchor is one of {ANCHORS}; got {anchor!r}; the first is the default.")
    rows, columns = query_grid
    near, near_size = crops.box.unflatten(-1, (2, 2)).unbind(-2)  # [V, B, 2] x, y and width, height
    far, far_size = queries.box.unflatten(-1, (2, 2)).unbind(-2)  # [L, B, 2]
    number = near.new_tensor([grid[1], grid[0]])
    unit = (number / near_size)[:, None]  # [V, 1, B, 2] patches per source pixel
    step = far_size / near.new_tensor([columns, rows]) * unit  # [V, L, B, 2] side of a query patch
    start = (far - near[:, None]) * unit  # [V, L, B, 2] corner of the query crop
    column = torch.arange(columns, device=near.device, dtype=near.dtype)
    row = torch.arange(rows, device=near.device, dtype=near.dtype)
    if flip_aware:
        column = torch.where(queries.flip[..., None], columns - 1 - column, column)  # [L, B, columns]
    x = start[..., :1] + column * step[..., :1]  # [V, L, B, columns]
    y = start[..., 1:] + row * step[..., 1:]  # [V, L, B, rows]
    if flip_aware:
        x = torch.where(crops.flip[:, None, :, None], number[0] - x - step[..., :1], x)
    if anchor == "center":
        x, y = x + (step[..., :1] - 1) / 2, y + (step[..., 1:] - 1) / 2
    shape = (*x.shape[:3], rows, columns)
    positions = torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], dim=-1)
    return positions.flatten(3, 4).transpose(1, 2).flatten(2, 3)
