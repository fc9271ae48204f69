"""Sums over the processes that train together, through which gradients flow."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .targets import distributed


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks. The gradient includes that of the other ranks' losses."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOverRanks.apply(gradient)


def mean_over_batch(sums: Tensor, images: int) -> Tensor:
    """The mean over the images of all ranks, of sums over this rank's; all ranks have equally many."""
    if not distributed():
        return sums / images
    return SumOverRanks.apply(sums) / (images * dist.get_world_size())
