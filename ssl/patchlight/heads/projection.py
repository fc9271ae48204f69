"""The projection head: an MLP to a normalised bottleneck, and the prototypes behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .prototypes import Prototypes

HIDDEN_NORMS = (None, "batch", "layer")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class ProjectionHead(nn.Module):
    """[..., in_dim] to an l2-normalised bottleneck z [..., bottleneck]; logits are `head.prototypes.logits(z)`.

    patch_prototypes: prototypes of its own for patch rows (iBOT with separate heads). Left out, patches share
        `prototypes`; `head.patch_prototypes` is right in both cases.
    hidden_norm: what follows each hidden layer. None: nothing, the default of all released recipes. "batch": a
        BatchNorm for each, as DINO's head offers. "layer": one LayerNorm that all hidden layers share, parameters
        included, as iBOT's released head does it (its authors may have meant one each; parity keeps one).
    activation: between the layers, "gelu" in all released recipes; iBOT's head offers "relu" too.
    """

    def __init__(
        self,
        in_dim: int,
        bottleneck: int = 256,
        hidden: int = 2048,
        layers: int = 3,
        *,
        prototypes: Prototypes,
        patch_prototypes: Prototypes | None = None,
        hidden_norm: str | None = None,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(
                f"ProjectionHead: layers counts the linear layers and must be at least 1, got {layers}; 3 is usual."
            )
        if hidden_norm not in HIDDEN_NORMS:
            raise ValueError(f"ProjectionHead: hidden_norm must be one of {HIDDEN_NORMS}, got {hidden_norm!r}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"ProjectionHead: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}.")
        for which in filter(None, (prototypes, patch_prototypes)):
            if which.width != bottleneck:
                raise ValueError(
                    f"ProjectionHead: prototypes must be as wide as the bottleneck, {bottleneck}, got {which.width}; "
                    f"build them with Prototypes({bottleneck}, count)."
                )
        self.mlp = _mlp(in_dim, hidden, bottleneck, layers, hidden_norm, activation)
        self.prototypes = prototypes
        self.own_patch_prototypes = None if patch_prototypes is prototypes else patch_prototypes

    @property
    def patch_prototypes(self) -> Prototypes:
        """The prototypes of patch rows, which may be those of the summary."""
        return self.prototypes if self.own_patch_prototypes is None else self.own_patch_prototypes

    def forward(self, x: Tensor) -> Tensor:
        z = self.mlp(x.reshape(-1, x.shape[-1]))  # rows, for BatchNorm
        z = z.reshape(*x.shape[:-1], z.shape[-1]).to(torch.promote_types(z.dtype, torch.float32))
        return F.normalize(z, dim=-1, eps=1e-12)


def _mlp(in_dim: int, hidden: int, out: int, layers: int, norm: str | None, activation: str) -> nn.Sequential:
    widths = [in_dim, *[hidden] * (layers - 1), out]
    shared = nn.LayerNorm(hidden) if norm == "layer" else None
    modules: list[nn.Module] = []
    for number in range(layers):
        modules.append(nn.Linear(widths[number], widths[number + 1]))
        if number == layers - 1:
            break
        if norm is not None:
            modules.append(nn.BatchNorm1d(hidden) if norm == "batch" else shared)
        modules.append(ACTIVATIONS[activation]())
    mlp = nn.Sequential(*modules)
    mlp.apply(start_linear)
    return mlp


def start_linear(module: nn.Module) -> None:
    """The released start of every linear layer of a head: truncated normal 0.02, bias 0. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
