"""The layers and the losses of the official steps, by the mathematics of the releases: every intermediate in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from patchlight.backbones.vit import Block, VisionTransformer
from patchlight.engine.branches import Branch
from patchlight.heads.projection import ProjectionHead
from patchlight.heads.prototypes import Prototypes
from patchlight.heads.summary import ClassAttentionBlock, ClassAttentionSummary
from patchlight.records import Crops, Queries
from patchlight_kernels.ops.neighbor_topk.reference import neighborhood

_attention = {"fused": False}


@contextmanager
def fused_attention() -> Iterator[None]:
    """What a user of a release changes first: the backbone's attention without its map in memory."""
    _attention["fused"] = True
    try:
        yield
    finally:
        _attention["fused"] = False


def vit_of(branch: Branch) -> VisionTransformer:
    """The branch's backbone, which is always a ViT here."""
    assert isinstance(branch.backbone, VisionTransformer)
    return branch.backbone


def head_of(branch: Branch, name: str) -> ProjectionHead:
    head = branch.heads[name]
    assert isinstance(head, ProjectionHead)
    return head


def attention_of(block: Block) -> Attention:
    assert isinstance(block.attn, Attention)
    return block.attn


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return (-target * logits.log_softmax(-1)).sum(-1)


def other_views(targets: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """The mean loss of every crop against each of the two global crops but itself."""
    pairs = [(i, v) for i in range(2) for v in range(len(outputs)) if v != i]
    return functools.reduce(torch.add, (cross_entropy(targets[i], outputs[v]).mean() for i, v in pairs)) / len(pairs)


def transformer(vit: VisionTransformer, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
    """All tokens before the final norm."""
    x = vit.embed(pixels, mask)
    for block in vit.blocks:
        assert isinstance(block, Block)
        q, k, v = project(block, x)
        x = x + block.drop_path1(attention_of(block).proj(attend(q, k, v)))
        x = x + block.drop_path2(block.mlp(block.norm2(x)))
    return x


def two_streams(vit: VisionTransformer, pixels: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Raw tokens, and queries that attend to the raw tokens and each other; every layer is called once per stream."""
    x, queries = vit.embed(pixels, mask), vit.embed_queries(Queries(positions))
    for block in vit.blocks:
        assert isinstance(block, Block)
        (q, k, v), (q_own, k_own, v_own) = project(block, x), project(block, queries)
        keys, values = torch.cat([k, k_own], dim=2), torch.cat([v, v_own], dim=2)
        x = x + block.drop_path1(attention_of(block).proj(attend(q, k, v)))
        queries = queries + block.drop_path1(attention_of(block).proj(attend(q_own, keys, values)))
        x = x + block.drop_path2(block.mlp(block.norm2(x)))
        queries = queries + block.drop_path2(block.mlp(block.norm2(queries)))
    return x, queries


def project(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [M, H, T, E]."""
    attention = attention_of(block)
    return attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the map in memory, [M, T, D]; or PyTorch's fused attention, within `fused_attention`."""
    if _attention["fused"]:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def aggregate(summary: ClassAttentionSummary, x: Tensor, grid: tuple[int, int], k: int | None) -> Tensor:
    """[M, 1 + N, D]: the summary of all patches, then the patches, or with k the summary of each patch's k neighbors."""
    images, patches, width = x.shape
    cls = class_attention_blocks(summary, summary.cls_token.expand(images, -1, -1), x)
    others = x
    if k is not None:
        table = neighborhood(*grid, 1, True)
        unit = F.normalize(x, dim=-1)
        similarity = (unit[:, table] @ unit.unsqueeze(-1)).squeeze(-1)  # [M, N, 8]
        slot = similarity.topk(k, dim=-1).indices
        near = x[:, table].gather(2, slot.unsqueeze(-1).expand(-1, -1, -1, width))  # [M, N, k, D]
        token = summary.cls_token.expand(images * patches, -1, -1)
        others = class_attention_blocks(summary, token, near.flatten(0, 1)).view(images, patches, width)
    return summary.norm(torch.cat([cls, others], dim=1))


def class_attention_blocks(summary: ClassAttentionSummary, state: Tensor, x: Tensor) -> Tensor:
    """The state [S, 1, D] attends to its own sequence x [S, L, D]; each sequence has its own keys and values projected."""
    for block in summary.blocks:
        assert isinstance(block, ClassAttentionBlock)
        u = block.norm1(torch.cat([state, x], dim=1))
        q = block.q(u[:, :1]).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        k = block.k(u).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        v = block.v(u).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        state = state + block.proj((weights @ v).transpose(1, 2).flatten(2))
        state = state + block.mlp(block.norm2(state))
    return state


def logits(prototypes: Prototypes, z: Tensor) -> Tensor:
    """Logits of every row, in memory; under autocast in 16 bits, as the releases' last layer gives them.

    The weight norm is computed in every call.
    """
    return F.linear(z, prototypes.directions())


def query_positions(queries: Crops, crops: Crops, patch: int) -> Tensor:
    """[V, B, L * n, 2] corners of the query crops' patches, in patches of each global crop as if it was not mirrored."""
    side, small = crops.pixels.shape[-1] // patch, queries.pixels.shape[-1] // patch
    places = []
    for box in crops.box:
        per_crop = []
        for query in queries.box:
            unit = side / box[:, 2:]  # [B, 2] patches per source pixel
            first, step = (query[:, :2] - box[:, :2]) * unit, query[:, 2:] / small * unit
            cells = torch.stack(torch.meshgrid(torch.arange(small), torch.arange(small), indexing="xy"), dim=-1)
            per_crop.append(first[:, None] + cells.flatten(0, 1).to(first) * step[:, None])
        places.append(torch.cat(per_crop, dim=1))
    return torch.stack(places)


def common_points(first: Tensor, second: Tensor, box: Tensor, flip: Tensor, count: int) -> Tensor:
    """[B, count, count, 2] grid_sample's coordinates in the crop (box, flip) of points in the overlap of two boxes."""
    start = torch.maximum(first[:, :2], second[:, :2])
    size = torch.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:]) - start
    share = torch.linspace(0, 1, count, device=box.device)[:, None]
    x, y = (((start - box[:, :2])[:, None] + share * size[:, None]) / box[:, None, 2:]).unbind(-1)  # [B, count]
    x = torch.where(flip[:, None], 1 - x, x)
    grid = torch.stack([x[:, None].expand(-1, count, -1), y[:, :, None].expand(-1, -1, count)], dim=-1) * 2 - 1
    return torch.where((size > 0).all(-1)[:, None, None, None], grid, -2.0)


def sample_twice(relation: Tensor, grid: Tensor) -> Tensor:
    """[B, M, N, N] sampled along the keys, then along the queries: [B, M, S * S, S * S], in fp32."""
    sampled = relation.float()
    for _ in range(2):
        side = int(sampled.shape[-1] ** 0.5)
        maps = sampled.flatten(1, 2).unflatten(-1, (side, side))
        points = F.grid_sample(maps, grid.float(), align_corners=False).flatten(2)
        sampled = points.unflatten(1, (*relation.shape[1:2], -1)).transpose(-2, -1)
    return sampled
