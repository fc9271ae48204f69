"""Bounds for results that exact arithmetic makes zero: how large rounding may make them, from the terms that cancel."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.batchnorm import _BatchNorm

from patchlight.heads.summary import ClassAttentionBlock, gather_patches


def rounding_bound(terms: Tensor, roundings: int, dtype: torch.dtype) -> Tensor:
    """How far two sums of terms of this magnitude may differ after so many roundings each.

    Roundings are up to half an eps and of random sign: n of them add up to sqrt(n) halves, and hardly ever to 4 times
    that (Higham and Mary, 2019). The recording has an error of the same size as ours, which makes the halves whole.
    """
    return 4 * roundings**0.5 * torch.finfo(dtype).eps * terms


def norm_terms(norm: _BatchNorm, x: Tensor, dy: Tensor) -> Tensor:
    """Magnitude [C] of the terms of a bias in front of a BatchNorm: its gradient is the sum of dx over rows [R, C].

    dx = gamma / sigma * (dy - mean(dy) - z * mean(dy * z)) with z = (x - mean(x)) / sigma: both means are sums over the
    same rows, so each of their terms appears twice, once below the mean.
    """
    x, dy = x.detach().double(), dy.double()
    sigma = (x.var(dim=0, correction=0) + norm.eps).sqrt()
    slope = (dy * (x - x.mean(dim=0)) / sigma).mean(dim=0).abs()
    gamma = 1.0 if norm.weight is None else norm.weight.detach().double().abs()
    return gamma / sigma * 2 * (dy.abs() + slope * x.abs() / sigma).sum(dim=0)


def key_terms(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, visible: Tensor | None = None) -> Tensor:
    """Magnitude [..., E] of the terms of a key's bias: q and dout are [..., E], k and v [..., n, E].

    A query's row of scores adds q * sum_j P_j (dP_j - D) to it, where dP_j = dout . v_j and D = sum_j P_j dP_j.
    """
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    scores = (k @ q.unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    mixed = (scores.softmax(dim=-1).unsqueeze(-2) @ v.abs()).squeeze(-2)
    return 2 * (dout.abs() * mixed).sum(dim=-1, keepdim=True) * q.abs() * q.shape[-1] ** -0.5


def key_roundings(rows: int, keys: int, width: int) -> int:
    """How many: the sum over rows of keys, dP over the width, the softmax, D and its row over the keys, a few per term."""
    return rows + width + 3 * keys + 8


class RoundingBounds(dict[str, Tensor]):
    """Bounds by name of parameter or buffer: made before a module's forward, filled by its forward and backward.

    - the gradient of a bias in front of a BatchNorm, which is subtracted with the mean. through: names of
      linear layers whose output goes only into such a layer, and of that layer;
    - the gradient of a key's bias in class attention, which shifts all scores alike;
    - the running mean of a BatchNorm, which is not more exact than its terms.
    """

    def __init__(self, module: nn.Module, through: dict[str, str] | None = None) -> None:
        super().__init__()
        self.through = through or {}
        self.terms: dict[nn.Module, Tensor] = {}  # of the latest output of a linear layer in front of a BatchNorm
        for name, part in module.named_modules():
            if isinstance(part, nn.Sequential):
                for (before, layer), (after, norm) in pairwise(part.named_children()):
                    if isinstance(layer, nn.Linear) and isinstance(norm, _BatchNorm):
                        layer.register_forward_hook(self._keep_terms)
                        norm.register_forward_hook(partial(self._bound_mean, f"{name}.{after}.running_mean", layer))
                        norm.register_forward_hook(partial(self._bound_bias, f"{name}.{before}", layer))
            elif isinstance(part, ClassAttentionBlock):
                KeyBiasBounds(part, partial(self._add, f"{name}.k.bias".lstrip(".")))

    def _add(self, name: str, bound: Tensor) -> None:
        self[name] = self.get(name, 0.0) + bound

    def clear_gradients(self) -> None:
        """Before the next backward; the bounds of running means stay."""
        for name in [name for name in self if name.endswith("bias")]:
            del self[name]

    def _keep_terms(self, layer: nn.Linear, inputs: tuple[Tensor], out: Tensor) -> None:
        """The maximum over rows, as BatchNorm may get the rows in parts."""
        terms = inputs[0].detach().double().abs().flatten(0, -2) @ layer.weight.detach().double().abs().T
        self.terms[layer] = terms.amax(dim=0) + (0.0 if layer.bias is None else layer.bias.detach().double().abs())

    def _bound_mean(self, name: str, layer: nn.Linear, norm: _BatchNorm, inputs: tuple[Tensor], out: Tensor) -> None:
        now = norm.momentum * rounding_bound(self.terms[layer], len(out) + layer.in_features + 8, out.dtype)
        self[name] = (1 - norm.momentum) * self.get(name, 0.0) + now

    def _bound_bias(self, name: str, layer: nn.Linear, norm: _BatchNorm, inputs: tuple[Tensor], out: Tensor) -> None:
        if layer.bias is None or not out.requires_grad:
            return

        def backward(dy: Tensor) -> None:
            terms, roundings = norm_terms(norm, inputs[0], dy), 2 * len(dy) + 8
            self._add(f"{name}.bias", rounding_bound(terms, roundings, dy.dtype))
            for earlier in (earlier for earlier, later in self.through.items() if later == name):
                reached = terms @ layer.weight.detach().double().abs()
                self._add(f"{earlier}.bias", rounding_bound(reached, roundings + len(terms), dy.dtype))

        out.register_hook(backward)


class KeyBiasBounds:
    """Reports the bound of the key's bias for each state of a class-attention block, from the gradient of its attention."""

    def __init__(self, block: ClassAttentionBlock, report: Callable[[Tensor], None]) -> None:
        self.block, self.report = block, report
        block.register_forward_pre_hook(self.before_block)
        block.proj.register_forward_pre_hook(self.before_projection)

    def before_block(self, block: nn.Module, inputs: tuple) -> None:
        """All rows are one state for all, or summaries and then, with an index, a state per patch."""
        patches, rows, index = (*inputs, None)[:3]
        every = torch.arange(patches.shape[1]).expand(len(patches), 1, -1)
        indices = [every] if index is None else [every, index]
        sizes = [table.shape[0] * table.shape[1] for table in indices]
        parts = [rows] * len(indices) if len(rows) == 1 else rows.split(sizes)
        self.patches, self.sizes = patches, sizes
        self.states = [
            (part.unflatten(0, (-1, 1 if len(part) == 1 else table.shape[1])), table)
            for part, table in zip(parts, indices, strict=True)
        ]

    def before_projection(self, proj: nn.Module, inputs: tuple[Tensor]) -> None:
        patches, states, sizes = self.patches, self.states, self.sizes

        def backward(dout: Tensor) -> None:
            for (state, table), part in zip(states, dout.split(sizes), strict=True):
                self.report(self.bound(patches, state, table, part.unflatten(0, table.shape[:2])))

        if inputs[0].requires_grad:
            inputs[0].register_hook(backward)

    def bound(self, patches: Tensor, state: Tensor, index: Tensor, dout: Tensor) -> Tensor:
        x, own = (self.in_float64(self.block.norm1, t) for t in (patches, state))
        q, k_self, v_self = (self.in_float64(part, own) for part in (self.block.q, self.block.k, self.block.v))
        k, v = (gather_patches(self.in_float64(part, x), index) for part in (self.block.k, self.block.v))
        images, queries, width = dout.shape
        k, v = (
            torch.cat([own.unsqueeze(2).expand(images, queries, 1, width), read], dim=2)
            for own, read in ((k_self, k), (v_self, v))
        )
        by_head = lambda t: t.unflatten(-1, (self.block.heads, -1))
        terms = key_terms(by_head(q), *(by_head(t).transpose(2, 3) for t in (k, v)), by_head(dout))
        keys = k.shape[2]
        roundings = key_roundings(images * queries * keys, keys, width // self.block.heads)
        return rounding_bound(terms.flatten(2).expand(images, queries, -1).sum(dim=(0, 1)), roundings, dout.dtype)

    @torch.no_grad()
    def in_float64(self, part: nn.Module, x: Tensor) -> Tensor:
        """A linear layer or a LayerNorm in float64."""
        weight, bias = part.weight.double(), part.bias.double()
        if isinstance(part, nn.Linear):
            return linear(x.double(), weight, bias)
        return nn.functional.layer_norm(x.double(), part.normalized_shape, weight, bias, part.eps)
