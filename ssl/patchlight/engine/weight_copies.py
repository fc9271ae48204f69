"""16-bit copies of weights, which the update writes: under autocast a step then casts no weight of a linear layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CopyOf(torch.autograd.Function):
    """The copy of a parameter in place of `parameter.to(dtype)`: the same value, and the gradient of the cast."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


class WeightCopies:
    """Copies of the weights and biases of all linear layers of a branch."""

    def __init__(self, branch: nn.Module, dtype: torch.dtype) -> None:
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}  # by the parameter's name: it, and its copy
        for path, module in branch.named_modules():
            if isinstance(module, nn.Linear):
                copies = [None if p is None else p.detach().to(dtype) for p in (module.weight, module.bias)]
                module.forward = partial(linear, module, *copies)  # type: ignore[method-assign] # in place: names stay
                for name, copy in zip(("weight", "bias"), copies, strict=True):
                    if copy is not None:
                        self.pairs[f"{path}.{name}"] = getattr(module, name), copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies all again, after parameters changed otherwise than by an update."""
        for parameter, copy in self.pairs.values():
            copy.copy_(parameter)

    def in_order(self, names: list[str], like: Tensor) -> list[Tensor]:
        """The copies by parameter names, empty for a parameter that has none."""
        dtype = next(iter(self.pairs.values()))[1].dtype
        none = like.new_empty(0, dtype=dtype)
        return [self.pairs[name][1] if name in self.pairs else none for name in names]


def linear(module: nn.Linear, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The layer with its copies under autocast, and with its parameters elsewhere."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, module.weight, module.bias)
    return F.linear(x, CopyOf.apply(module.weight, weight), None if bias is None else CopyOf.apply(module.bias, bias))
