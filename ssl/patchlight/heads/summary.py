"""Summaries: one vector per image from a backbone's tokens, and each patch's aggregated neighbors for SelfPatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from patchlight_kernels import class_attention, neighbor_topk

from ..records import NeighborRule, Tokens
from .projection import start_linear

POOLS = ("class_attention", "mean")


def build_summary(kind: str, backbone: nn.Module) -> nn.Module:
    """The summary that goes onto a backbone."""
    if kind == "cls":
        return ClassTokenSummary()
    eps = {} if backbone.norm_eps is None else {"norm_eps": backbone.norm_eps}
    if kind == "class_attention":
        return ClassAttentionSummary(backbone.width, backbone.heads, **eps)
    # A transformer without a class token leaves its final norm to the summary; a backbone that never had one needs none.
    return MeanSummary(backbone.width, **eps) if eps else MeanSummary()


@dataclass(frozen=True, slots=True)
class Summary:
    """What a summary head says of M images."""

    summary: Tensor  # [M, D] one vector per image
    patches: Tensor  # [M, N, D] normalised patch features
    aggregated: Tensor | None  # [M, N, D] each patch's aggregated neighbors, when asked for


torch.export.register_dataclass(Summary)  # else FSDP2 of torch 2.11 misses the tensors inside and drops gradients


class ClassTokenSummary(nn.Module):
    """The class token of a backbone that has one (DINO, iBOT). Of neighbors it can only take the mean."""

    kind = "cls"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()  # a backbone with a class token ends with a norm of its own

    def forward(self, tokens: Tokens, neighbors: NeighborRule | None = None) -> Summary:
        if tokens.cls is None:
            raise ValueError(
                "ClassTokenSummary: the backbone must have a class token, got tokens without one; "
                "build it with class_token=True or use ClassAttentionSummary."
            )
        return Summary(tokens.cls, tokens.patches, _mean_if_asked(self, tokens, tokens.patches, neighbors))


class MeanSummary(nn.Module):
    """The mean of the patches. With `dim`, a LayerNorm of its own comes first, for backbones without a final norm."""

    kind = "mean"

    def __init__(self, dim: int | None = None, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.Identity() if dim is None else nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, tokens: Tokens, neighbors: NeighborRule | None = None) -> Summary:
        patches = self.norm(tokens.patches)
        return Summary(patches.mean(dim=1), patches, _mean_if_asked(self, tokens, patches, neighbors))


class ClassAttentionSummary(nn.Module):
    """SelfPatch's aggregation head: a learned token reads the patches through class-attention blocks.

    The summary has read all patches; with a `NeighborRule`, a twin of the token per patch has read that patch's
    selected neighbors, through the same weights. One LayerNorm ends summary, patches and aggregates alike. The
    patches themselves are never updated. No LayerScale, as released (whatever the released class name says).
    """

    kind = "class_attention"

    def __init__(self, dim: int, heads: int, depth: int = 2, mlp_ratio: float = 4.0, norm_eps: float = 1e-6) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(
                f"ClassAttentionSummary: depth must be at least 1, got {depth}; the released head has 2 blocks."
            )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(ClassAttentionBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, tokens: Tokens, neighbors: NeighborRule | None = None) -> Summary:
        if tokens.cls is not None:
            raise ValueError(
                "ClassAttentionSummary: the backbone must leave its patches as the raw residual stream, "
                "got tokens with a class token; build it with class_token=False or use ClassTokenSummary."
            )
        if neighbors is not None and neighbors.pool not in POOLS:
            raise ValueError(f"ClassAttentionSummary: pool must be one of {POOLS}, got {neighbors.pool!r}.")
        x = tokens.patches
        index = None if neighbors is None else select_neighbors(tokens, neighbors)
        attend = neighbors is not None and neighbors.pool == "class_attention"
        summary, aggregated = self.cls_token, self.cls_token if attend else None
        for block in self.blocks:
            summary, aggregated = block(x, summary, aggregated, index)
        patches = self.norm(x)
        if attend:
            aggregated = self.norm(aggregated)
        elif index is not None:
            aggregated = mean_of_neighbors(patches, index)
        return Summary(self.norm(summary.squeeze(1)), patches, aggregated)


class ClassAttentionBlock(nn.Module):
    """A pre-norm block in which only a state attends: to itself and to patches, all of them or a chosen few.

    The patches are normalised and projected to keys and values once, however many states read them; not at all where a
    summary is the only one.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"ClassAttentionBlock: heads must divide dim, got {heads} and {dim}; change one of them.")
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.apply(start_linear)

    def forward(
        self, patches: Tensor, summary: Tensor, aggregated: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The summary [M, 1, D] reads all patches [M, N, D]; aggregated [M, N, D], if any, those of index [M, N, k].

        Either state may be a single [1, 1, D] that stands for all.
        """
        x = self.norm1(patches)
        if aggregated is None:
            return self._move(summary, self._read_unprojected(self.norm1(summary), x)), None
        k, v = self._split(self.k(x)), self._split(self.v(x))
        return (
            self._move(summary, self._read(self.norm1(summary), k, v, None)),
            self._move(aggregated, self._read(self.norm1(aggregated), k, v, index)),
        )

    def _read(self, own: Tensor, k: Tensor, v: Tensor, index: Tensor | None) -> Tensor:
        """What states [M or 1, Q, D] find in themselves and in patches, [M, Q, heads, D / heads]."""
        q, k_self, v_self = (self._split(project(own)) for project in (self.q, self.k, self.v))
        return class_attention(q, k_self, v_self, k, v, index)

    def _read_unprojected(self, own: Tensor, x: Tensor) -> Tensor:
        """The same for one state per image, which reads all patches x [M, N, D]: 4 N D^2 multiplications less.

        The projection of keys moves to the query, q . (W x + b) = (q W) . x + q . b, and that of values to the mixture,
        whose weights sum to 1.
        """
        q = self._split(self.q(own) * (x.shape[-1] // self.heads) ** -0.5).squeeze(1)
        asked = torch.einsum("mhe,hed->mhd", q, self._by_head(self.k.weight))
        scores = torch.cat([(asked @ own.mT).expand(len(x), -1, -1), asked.expand(len(x), -1, -1) @ x.mT], dim=2)
        scores = scores + (q * self._by_head(self.k.bias)).sum(dim=-1, keepdim=True)  # the softmax does not see it
        weights = scores.softmax(dim=2)
        mixture = weights[:, :, 1:] @ x + weights[:, :, :1] @ own
        found = torch.einsum("mhd,hed->mhe", mixture, self._by_head(self.v.weight)) + self._by_head(self.v.bias)
        return found[:, None]

    def _move(self, state: Tensor, found: Tensor) -> Tensor:
        state = state + self.proj(found.flatten(2))
        return state + self.mlp(self.norm2(state))

    def _by_head(self, parameter: Tensor) -> Tensor:
        """[D, ...] to [heads, D / heads, ...]."""
        return parameter.unflatten(0, (self.heads, -1))

    def _split(self, x: Tensor) -> Tensor:
        """[..., D] to [..., heads, D / heads]."""
        return x.unflatten(-1, (self.heads, -1))


def gather_patches(x: Tensor, index: Tensor) -> Tensor:
    """x [M, N, ...] at index [M, Q, k] -> [M, Q, k, ...]; where the index is -1, some row that must not be used."""
    image = torch.arange(len(x), device=x.device)[:, None, None]
    rows = image * x.shape[1] + index.clamp(min=0)
    return x.flatten(0, 1)[rows]


def select_neighbors(tokens: Tokens, rule: NeighborRule) -> Tensor:
    """Each patch's k most similar candidates by cosine of the patches as the backbone left them, int32 [M, N, k]."""
    return neighbor_topk(tokens.patches.detach(), tokens.grid, rule.k, radius=rule.radius, border=rule.border)


def mean_of_neighbors(patches: Tensor, index: Tensor) -> Tensor:
    """The mean of the selected normalised patches, [M, N, D]: nothing learned, missing neighbors (-1) left out."""
    exists = (index >= 0)[..., None].to(patches.dtype)
    return (gather_patches(patches, index) * exists).sum(dim=2) / exists.sum(dim=2)


def _mean_if_asked(head: nn.Module, tokens: Tokens, patches: Tensor, rule: NeighborRule | None) -> Tensor | None:
    if rule is None:
        return None
    if rule.pool != "mean":
        raise ValueError(
            f"{type(head).__name__}: neighbors can be pooled by 'mean' only, got pool={rule.pool!r}; "
            "'class_attention' needs ClassAttentionSummary."
        )
    return mean_of_neighbors(patches, select_neighbors(tokens, rule))
