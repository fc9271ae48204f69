"""The specification of neighbor_topk in plain PyTorch: any device, fp64 in fp64, everything else in fp32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...arguments import accumulator

EPS = 1e-12  # norms below this count as this, so a zero patch has cosine 0 with all patches
NAN_RANK = -2.0  # below every cosine: a NaN similarity is chosen last, lower index first


def capacity(height: int, width: int, radius: int) -> int:
    """The most neighbors a patch can have; radius < 0 means all patches."""
    if radius < 0:
        return height * width - 1
    return min(2 * radius + 1, height) * min(2 * radius + 1, width) - 1


@cache
def neighborhood(height: int, width: int, radius: int, wrap: bool) -> Tensor:
    """[N, capacity] int64 table of each patch's neighbors, ascending; -1 stands behind the last of those that have fewer.

    A neighborhood is a set: on a grid smaller than the window a neighbor counts once, and a patch is never its own neighbor.
    """
    rows = torch.arange(height * width) // width
    columns = torch.arange(height * width) % width

    def distance(positions: Tensor, size: int) -> Tensor:
        steps = (positions[:, None] - positions[None, :]).abs()
        return torch.minimum(steps, size - steps) if wrap else steps

    inside = torch.ones(height * width, height * width, dtype=torch.bool)
    if radius >= 0:
        inside = (distance(rows, height) <= radius) & (distance(columns, width) <= radius)
    inside.fill_diagonal_(False)
    table = torch.full((height * width, capacity(height, width, radius)), -1)
    for patch, members in enumerate(inside):
        found = members.nonzero().flatten()
        table[patch, : len(found)] = found
    return table


def similarities(x: Tensor, height: int, width: int, radius: int, wrap: bool) -> tuple[Tensor, Tensor]:
    """Cosine similarity of each patch with its neighbors [B, N, C], and the table [N, C] they belong to."""
    table = neighborhood(height, width, radius, wrap).to(x.device)
    wide = x.to(accumulator(x.dtype))
    square = wide.square().sum(dim=-1, keepdim=True)
    norm = (
        square.sqrt().clamp(min=EPS).masked_fill(square.isinf(), torch.nan)
    )  # not 0, which an overflow would pass for
    unit = wide / norm
    gram = unit @ unit.transpose(1, 2)
    return gram.gather(2, table.clamp(min=0).expand(x.shape[0], -1, -1)), table


def neighbor_topk_fwd(
    x: Tensor, height: int, width: int, k: int, radius: int, wrap: bool, scores: bool
) -> tuple[Tensor, Tensor]:
    """Takes the arguments of `patchlight::neighbor_topk_fwd`. A stable sort gives ties to the lower index."""
    similarity, table = similarities(x, height, width, radius, wrap)
    rank = similarity.nan_to_num(nan=NAN_RANK).masked_fill(table < 0, -torch.inf)
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    index = table.expand(x.shape[0], -1, -1).gather(2, order).int()
    if not scores:
        return index, similarity.new_empty(0)
    return index, similarity.masked_fill(table < 0, -torch.inf).gather(2, order).to(accumulator(x.dtype))
