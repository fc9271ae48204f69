"""BatchNorm over the images of all ranks, on any device, so that several ranks train as one with the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import Ranks


class _Standardize(torch.autograd.Function):
    """x [B, C, ...] minus the mean and over the deviation of each channel, over the images of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The standardized x, mean, variance and how many values each channel has."""
        over, exact = _all_but_channels(x), x.to(torch.promote_types(x.dtype, torch.float32))
        sums = torch.cat([exact.sum(over), exact.new_full((1,), x.numel() // x.shape[1])])
        dist.all_reduce(sums)
        count, mean = sums[-1], sums[:-1] / sums[-1]
        centered = exact - _spread(mean, x)
        squares = centered.square().sum(over)
        dist.all_reduce(squares)
        variance = squares / count
        scale = (variance + eps).rsqrt()
        out = centered * _spread(scale, x)
        ctx.save_for_backward(out, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        out, scale, count = ctx.saved_tensors
        gradient, over = gradients[0], _all_but_channels(out)
        sums = torch.stack([gradient.sum(over), (gradient * out).sum(over)])
        dist.all_reduce(sums)
        mean, along = (_spread(part, out) for part in sums / count)
        return (gradient - mean - out * along) * _spread(scale, out), None


class SharedNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of the images of all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        out, mean, variance, count = _Standardize.apply(input, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)
        if self.weight is not None:
            out = out * _spread(self.weight, out) + _spread(self.bias, out)
        return out.to(input.dtype)


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return tuple(d for d in range(x.ndim) if d != 1)


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Values of channels [C] beside x [B, C, ...]."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def share_norms(module: nn.Module, ranks: Ranks) -> None:
    """Turns every nn.BatchNorm2d below a module into one over all ranks. Nothing changes where there is one rank."""
    if ranks.world == 1:
        return
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SharedNorm  # the same parameters, buffers and hooks


@torch.no_grad()
def average_statistics(module: nn.Module, ranks: Ranks) -> None:
    """Running statistics become their mean over ranks, those of norms too that are of another class than nn.BatchNorm2d."""
    if ranks.world == 1:
        return
    for name, statistics in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            statistics.copy_(ranks.sum(statistics) / ranks.world)
