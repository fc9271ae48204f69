"""The projection head: an MLP to a normalized bottleneck, and the prototypes after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check, check_choice, check_least
from .prototypes import Prototypes

HIDDEN_NORMS = ("batch", "layer")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class ProjectionHead(nn.Module):
    """[..., in_dim] to an l2-normalized bottleneck z [..., bottleneck]; logits are `head.prototypes.logits(z)`.

    patch_prototypes: separate prototypes for patch rows (iBOT with separate heads). If left out, patches share
        `prototypes`; `head.patch_prototypes` is right in both cases.
    hidden_norm: what follows each hidden layer. None: nothing, the default of all released recipes. "batch": a
        BatchNorm for each, an option of DINO's head. "layer": a single LayerNorm that all hidden layers share,
        parameters included, as in iBOT's released head (its authors may have wanted a norm for each layer).
    activation: between the layers, "gelu" in all released recipes; "relu" is an option of iBOT's head.
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
        check_least("ProjectionHead: layers (the linear ones)", layers, 1, "3 is usual")
        if hidden_norm is not None:
            check_choice("ProjectionHead: hidden_norm, if not None,", hidden_norm, HIDDEN_NORMS)
        check_choice("ProjectionHead: activation", activation, ACTIVATIONS)
        for given in filter(None, (prototypes, patch_prototypes)):
            check(
                given.width == bottleneck,
                f"ProjectionHead: prototypes must be as wide as the bottleneck, {bottleneck}",
                given.width,
                f"build them with Prototypes({bottleneck}, count)",
            )
        self.mlp = _mlp(in_dim, hidden, bottleneck, layers, hidden_norm, activation)
        self.prototypes = prototypes
        self.own_patch_prototypes = None if patch_prototypes is prototypes else patch_prototypes

    @property
    def patch_prototypes(self) -> Prototypes:
        """The prototypes for patch rows, which may be those for the summary."""
        return self.prototypes if self.own_patch_prototypes is None else self.own_patch_prototypes

    def forward(self, x: Tensor) -> Tensor:
        z = self.mlp(x.reshape(-1, x.shape[-1]))  # BatchNorm takes rows
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
        if norm == "batch":
            modules.append(nn.BatchNorm1d(hidden))
        elif shared is not None:
            modules.append(shared)
        modules.append(ACTIVATIONS[activation]())
    mlp = nn.Sequential(*modules)
    mlp.apply(init_linear)
    return mlp


def init_linear(module: nn.Module) -> None:
    """The released initialization of all linear layers of heads: truncated normal 0.02, bias 0. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
