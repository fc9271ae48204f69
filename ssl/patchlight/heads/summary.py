"""Summaries: one vector per image from a backbone's tokens, and each patch's aggregated neighbors for SelfPatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from patchlight_kernels import class_attention, neighbor_topk

from ..checks import check, check_choice, check_least, sentence
from ..records import NeighborRule, Tokens
from .projection import init_linear

NORM_EPS = 1e-6
POOLS = ("class_attention", "mean")


@dataclass(frozen=True, slots=True)
class Summary:
    """The output of a summary head for M images."""

    summary: Tensor  # [M, D] one vector per image
    patches: Tensor  # [M, N, D] normalized patch features
    aggregated: Tensor | None  # [M, N, D] each patch's aggregated neighbors, with a NeighborRule


torch.export.register_dataclass(Summary)  # else FSDP2 of torch 2.11 misses the tensors inside and drops gradients


class SummaryHead(nn.Module):
    """Makes one vector per image from a backbone's tokens."""

    kind: str  # as in Model.summary
    norm: nn.Module  # the final norm, also of query tokens

    def forward(self, tokens: Tokens, neighbors: NeighborRule | None = None) -> Summary:
        raise NotImplementedError

    def _pool_neighbors(self, tokens: Tokens, patches: Tensor, rule: NeighborRule | None) -> Tensor | None:
        """The mean of each patch's neighbors, if there is a rule; heads without attention have no other way."""
        if rule is None:
            return None
        if rule.pool != "mean":
            allowed = f"{type(self).__name__}: neighbors can be pooled by 'mean' only"
            raise ValueError(sentence(allowed, f"pool={rule.pool!r}", "'class_attention' needs ClassAttentionSummary"))
        return mean_of_neighbors(patches, select_neighbors(tokens, rule))


class ClassTokenSummary(SummaryHead):
    """The class token of a backbone that has one (DINO, iBOT)."""

    kind = "cls"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()  # a backbone with a class token has a final norm of its own

    def forward(self, tokens: Tokens, neighbors: NeighborRule | None = None) -> Summary:
        if tokens.cls is None:
            rule = "ClassTokenSummary: the backbone must have a class token"
            remedy = "build it with class_token=True or use ClassAttentionSummary"
            raise ValueError(sentence(rule, "tokens without one", remedy))
        return Summary(tokens.cls, tokens.patches, self._pool_neighbors(tokens, tokens.patches, neighbors))


class MeanSummary(SummaryHead):
    """The mean of the patches. With `dim`, a LayerNorm comes first, for backbones without a final norm."""

    kind = "mean"

    def __init__(self, dim: int | None = None, norm_eps: float = NORM_EPS) -> None:
        super().__init__()
        self.norm = nn.Identity() if dim is None else nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, tokens: Tokens, neighbors: NeighborRule | None = None) -> Summary:
        patches = self.norm(tokens.patches)
        return Summary(patches.mean(dim=1), patches, self._pool_neighbors(tokens, patches, neighbors))


class ClassAttentionSummary(SummaryHead):
    """SelfPatch's aggregation head: a learned token attends to the patches in class-attention blocks.

    The summary attends to all patches; with a `NeighborRule`, a copy of the token per patch attends to that patch's
    selected neighbors, with the same weights. The same LayerNorm ends summary, patches and aggregated neighbors. The
    patches themselves are never updated. No LayerScale, as in the released code (in spite of its class's name).
    """

    kind = "class_attention"

    def __init__(
        self, dim: int, heads: int, depth: int = 2, mlp_ratio: float = 4.0, norm_eps: float = NORM_EPS
    ) -> None:
        super().__init__()
        check_least("ClassAttentionSummary: depth", depth, 1, "the released head has 2 blocks")
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(ClassAttentionBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, tokens: Tokens, neighbors: NeighborRule | None = None) -> Summary:
        if tokens.cls is not None:
            rule = "ClassAttentionSummary: the backbone must return its patches as the raw residual stream"
            remedy = "build it with class_token=False or use ClassTokenSummary"
            raise ValueError(sentence(rule, "tokens with a class token", remedy))
        if neighbors is not None:
            check_choice("ClassAttentionSummary: pool", neighbors.pool, POOLS)
        x = tokens.patches
        index = None if neighbors is None else select_neighbors(tokens, neighbors)
        attend = neighbors is not None and neighbors.pool == "class_attention"
        states = self.cls_token.flatten(0, 1)
        for block in self.blocks:
            states = block(x, states, index if attend else None)
        patches, states = self.norm(x), self.norm(states)
        if attend:
            return Summary(states[: len(x)], patches, states[len(x) :].unflatten(0, x.shape[:2]))
        return Summary(states, patches, None if index is None else mean_of_neighbors(patches, index))


class ClassAttentionBlock(nn.Module):
    """A pre-norm block in which only a state attends: to itself and to patches, all of them or a few.

    The patches are normalized and projected to keys and values once, by one product, for any number of states; not at all
    where summaries are the only states. All states go through the same products as rows of one matrix.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        check(
            dim % heads == 0, "ClassAttentionBlock: heads must divide dim", f"{heads} and {dim}", "change one of them"
        )
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.apply(init_linear)

    def forward(self, patches: Tensor, states: Tensor, index: Tensor | None = None) -> Tensor:
        """New states [R, D] for patches [M, N, D]: M summaries, which attend to all patches of their image.

        With index [M, N, k] a state per patch follows them, image by image, which attends to that index: [M + M N, D].
        states may be a single row, which then stands for all.
        """
        x, own = self.norm1(patches), self.norm1(states)
        attended = self._attend_unprojected(own.unsqueeze(1), x) if index is None else self._attend(own, x, index)
        states = states + self.proj(attended.flatten(1))
        return states + self.mlp(self.norm2(states))

    def _attend(self, own: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """Attention of normalized states, rows as in forward, to themselves and to patches: [M + M N, heads, D / heads]."""
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        width, images = x.shape[-1], len(x)
        rows = self._split(F.linear(own, weight, bias).unflatten(-1, (3, width)))
        kv = self._split(F.linear(x, weight[width:], bias[width:]).unflatten(-1, (2, width)))
        k, v = kv.unbind(2)
        summary = each = rows.unsqueeze(0)
        if len(own) > 1:
            summary, each = rows.split([images, len(rows) - images])
            summary, each = summary.unsqueeze(1), each.unflatten(0, x.shape[:2])
        q, k_self, v_self = summary.unbind(2)
        of_summaries = class_attention(q, k_self, v_self, k, v)
        q, k_self, v_self = each.unbind(2)
        of_patches = class_attention(q, k_self, v_self, k, v, index)
        return torch.cat([of_summaries.flatten(0, 1), of_patches.flatten(0, 1)])

    def _attend_unprojected(self, state: Tensor, x: Tensor) -> Tensor:
        """The same for one state per image, [M or 1, 1, D], which attends to all patches x [M, N, D]: [M, heads, D / heads].

        It needs 4 N D^2 multiplications less: the projection of keys is applied to the query, q . (W x + b) = (q W) . x +
        q . b, and that of values to the weighted mean, as the weights sum to 1.
        """
        q = self._split(self.q(state) * (x.shape[-1] // self.heads) ** -0.5).squeeze(1)
        q_k = torch.einsum("mhe,hed->mhd", q, self._by_head(self.k.weight))
        images = x.shape[0]  # len(x) would be a constant in an export
        scores = torch.cat([(q_k @ state.mT).expand(images, -1, -1), q_k.expand(images, -1, -1) @ x.mT], dim=2)
        # The softmax does not depend on the bias of keys.
        scores = scores + (q * self._by_head(self.k.bias)).sum(dim=-1, keepdim=True)
        weights = scores.softmax(dim=2)
        mean = weights[:, :, 1:] @ x + weights[:, :, :1] @ state
        attended = torch.einsum("mhd,hed->mhe", mean, self._by_head(self.v.weight)) + self._by_head(self.v.bias)
        return attended

    def _by_head(self, parameter: Tensor) -> Tensor:
        """[D, ...] to [heads, D / heads, ...]."""
        return parameter.unflatten(0, (self.heads, -1))

    def _split(self, x: Tensor) -> Tensor:
        """[..., D] to [..., heads, D / heads]."""
        return x.unflatten(-1, (self.heads, -1))


class BackboneSizes(Protocol):
    """The attributes of a backbone that a summary head is built from."""

    width: int
    heads: int
    norm_eps: float | None

    @property
    def has_final_norm(self) -> bool: ...


def build_summary(kind: str, backbone: BackboneSizes) -> SummaryHead:
    """The summary head of this kind for a backbone."""
    if kind == "cls":
        return ClassTokenSummary()
    eps = backbone.norm_eps
    if kind == "class_attention":
        return ClassAttentionSummary(backbone.width, backbone.heads, norm_eps=NORM_EPS if eps is None else eps)
    # The final norm of a transformer that ends without one is in the summary; other backbones never had one.
    return MeanSummary() if eps is None or backbone.has_final_norm else MeanSummary(backbone.width, eps)


def gather_patches(x: Tensor, index: Tensor) -> Tensor:
    """x [M, N, ...] at index [M, Q, k] -> [M, Q, k, ...]; where the index is -1, some row that must not be used."""
    image = torch.arange(len(x), device=x.device)[:, None, None]
    rows = image * x.shape[1] + index.clamp(min=0)
    return x.flatten(0, 1)[rows]


def select_neighbors(tokens: Tokens, rule: NeighborRule) -> Tensor:
    """Each patch's k most similar candidates, by cosine of the backbone's patches, int32 [M, N, k]."""
    index = neighbor_topk(tokens.patches.detach(), tokens.grid, rule.k, radius=rule.radius, border=rule.border)
    assert isinstance(index, Tensor)  # not a tuple, as scores are not returned
    return index


def mean_of_neighbors(patches: Tensor, index: Tensor) -> Tensor:
    """The mean of the selected normalized patches, [M, N, D], without parameters; missing neighbors (-1) are left out."""
    exists = (index >= 0)[..., None].to(patches.dtype)
    return (gather_patches(patches, index) * exists).sum(dim=2) / exists.sum(dim=2)
