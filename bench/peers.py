"""What a user would run instead of an op, by op: faithful ports of the official mathematics, dense forms, libraries.

Each peer takes the public function's arguments and returns something comparable. None of them is ours to tune.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from patchlight_kernels.ops.neighbor_topk import reference as neighbor_reference

_tables: dict[tuple, Tensor] = {}


def _table(*key) -> Tensor:
    """The neighbor table of (height, width, radius, wrap, device), made once, as the release does for its two grids."""
    if key not in _tables:
        height, width, radius, wrap, device = key
        _tables[key] = neighbor_reference.neighborhood(height, width, -1 if radius is None else radius, wrap).to(device)
    return _tables[key]


def neighbor_topk_official(x, grid, k, radius, border, return_scores):
    """As released: normalise, gather every patch's neighbors into [B, N, C, D], multiply, top-k."""
    if radius is None:
        raise NotImplementedError("the release has no all-patches form: gathering it takes B * N * N * D values")
    table = _table(*grid, radius, border == "wrap", str(x.device))
    unit = F.normalize(x, dim=-1)
    similarity = (unit[:, table] @ unit.unsqueeze(-1)).squeeze(-1)
    score, slot = similarity.topk(k, dim=-1)
    index = table.expand(x.shape[0], -1, -1).gather(2, slot)
    return index, score


def neighbor_topk_dense(x, grid, k, radius, border, return_scores):
    """The whole Gram matrix, everything outside the window masked away, top-k."""
    table = _table(*grid, radius, border == "wrap", str(x.device))
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device).scatter_(1, table, 0.0)
    unit = F.normalize(x, dim=-1)
    score, index = (unit @ unit.transpose(1, 2) + mask).topk(k, dim=-1)
    return index, score


def neighbor_topk_reference(x, grid, k, radius, border, return_scores):
    radius = -1 if radius is None else radius
    return neighbor_reference.neighbor_topk_fwd(x, *grid, k, radius, border == "wrap", return_scores)


# The first peer is the official mathematics; the speedups of a table are against it.
PEERS: dict[str, dict[str, Callable]] = {
    "neighbor_topk": {
        "official eager": neighbor_topk_official,
        "dense eager": neighbor_topk_dense,
        "reference": neighbor_topk_reference,
        "compile(official)": torch.compile(neighbor_topk_official, dynamic=False),
        "compile(dense)": torch.compile(neighbor_topk_dense, dynamic=False),
    },
}
