"""Projector and predictor of the contrastive methods: an MLP with BatchNorm, whose statistics are of a single view."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import check_least


class ContrastHead(nn.Module):
    """[V, B, in_dim] to [V, B, out]: linear layers with BatchNorm and ReLU between them.

    For BatchNorm each view is a batch of its own, in the given order, while a linear layer takes all rows at once.
    bias: of the linear layers. MoCo v3 has none, MoBY has them.
    last_norm: a BatchNorm without scale and shift at the end, as in MoCo v3 (but not in the predictor for its ResNet).
    """

    def __init__(
        self, in_dim: int, hidden: int = 4096, out: int = 256, layers: int = 2, *, bias: bool, last_norm: bool
    ) -> None:
        super().__init__()
        check_least("ContrastHead: layers (the linear ones)", layers, 1, "2 is usual")
        widths = [in_dim, *[hidden] * (layers - 1), out]
        modules: list[nn.Module] = []
        for number in range(layers):
            modules.append(nn.Linear(widths[number], widths[number + 1], bias=bias))
            if number < layers - 1:
                modules += [nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        if last_norm:
            modules.append(nn.BatchNorm1d(out, affine=False))
        self.mlp = nn.Sequential(*modules)

    def forward(self, x_VBD: Tensor) -> Tensor:
        for module in self.mlp:
            by_view = isinstance(module, _BatchNorm)
            x_VBD = torch.stack([module(view) for view in x_VBD]) if by_view else module(x_VBD)
        return x_VBD
