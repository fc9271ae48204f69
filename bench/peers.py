"""What a user would run instead of an op: ports of the official mathematics, dense forms, libraries.

Each peer takes the public function's arguments and returns something comparable. We do not tune them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from patchlight_kernels import JITTER_ORDERS, PHOTOMETRIC_COLUMNS, prototype_ce
from patchlight_kernels.ops.class_attention.reference import state_shape as class_attention_shape
from patchlight_kernels.ops.neighbor_topk import reference as neighbor_reference
from patchlight_kernels.ops.photometric import reference as photometric_reference
from patchlight_kernels.ops.prototype_ce import pieces as prototype_pieces

_tables: dict[tuple, Tensor] = {}


def _table(*key) -> Tensor:
    """The neighbor table of (height, width, radius, wrap, device), made once, as the release does for its two grids."""
    if key not in _tables:
        height, width, radius, wrap, device = key
        _tables[key] = neighbor_reference.neighborhood(height, width, -1 if radius is None else radius, wrap).to(device)
    return _tables[key]


def neighbor_topk_official(x, grid, k, radius, border, return_scores):
    """As released: normalize, gather every patch's neighbors into [B, N, C, D], multiply, top-k."""
    if radius is None:
        raise NotImplementedError("the release has no form for all patches: it would gather B * N * N * D values")
    table = _table(*grid, radius, border == "wrap", str(x.device))
    unit = F.normalize(x, dim=-1)
    similarity = (unit[:, table] @ unit.unsqueeze(-1)).squeeze(-1)
    score, slot = similarity.topk(k, dim=-1)
    index = table.expand(x.shape[0], -1, -1).gather(2, slot)
    return index, score


def neighbor_topk_dense(x, grid, k, radius, border, return_scores):
    """The whole Gram matrix, everything outside the window masked, top-k."""
    table = _table(*grid, radius, border == "wrap", str(x.device))
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device).scatter_(1, table, 0.0)
    unit = F.normalize(x, dim=-1)
    score, index = (unit @ unit.transpose(1, 2) + mask).topk(k, dim=-1)
    return index, score


def neighbor_topk_reference(x, grid, k, radius, border, return_scores):
    radius = -1 if radius is None else radius
    height, width = grid
    return neighbor_reference.neighbor_topk_fwd(x, height, width, k, radius, border == "wrap", return_scores)


def class_attention_official(q, k_self, v_self, k_patches, v_patches, index):
    """As released: keys and values gathered into copies [M, Q, 1 + k, H, E], attention over each; no neighbor may be missing."""
    shape = class_attention_shape(q, k_self, v_self, k_patches, index)
    own = lambda x: x.expand(shape)[:, :, None]
    keys, values = (
        torch.cat([own(of_self), _copies(of_patches, index, shape)], dim=2).transpose(2, 3)  # [M, Q, H, 1 + k, E]
        for of_self, of_patches in ((k_self, k_patches), (v_self, v_patches))
    )
    scores = own(q).transpose(2, 3) @ keys.transpose(-2, -1) * shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ values).squeeze(3)


def _copies(x: Tensor, index: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The rows that each state attends to, [M, Q, k, H, E]."""
    if index is None:
        return x[:, None].expand(-1, shape[1], -1, -1, -1)
    places = index.long().flatten(1)[:, :, None, None].expand(-1, -1, *shape[2:])
    return x.gather(1, places).unflatten(1, index.shape[1:])


def class_attention_smart(q, k_self, v_self, k_patches, v_patches, index):
    """The state's own key and the gathered keys without joining them, missing neighbors masked."""
    shape = class_attention_shape(q, k_self, v_self, k_patches, index)
    q, k_self, v_self = (x.expand(shape) for x in (q, k_self, v_self))
    keys, values = k_patches, v_patches
    axes = "mnhe"
    if index is not None:
        axes = "mqnhe"
        image = torch.arange(shape[0], device=q.device)[:, None, None]
        keys, values = (x[image, index.long().clamp(min=0)] for x in (k_patches, v_patches))
    scores = torch.einsum(f"mqhe,{axes}->mqhn", q, keys)
    if index is not None:
        scores = scores.masked_fill((index < 0)[:, :, None], -torch.inf)
    own_score = (q * k_self).sum(dim=-1, keepdim=True)
    weights = (torch.cat([own_score, scores], dim=-1) * shape[-1] ** -0.5).softmax(dim=-1)
    return weights[..., :1] * v_self + torch.einsum(f"mqhn,{axes}->mqhe", weights[..., 1:], values)


def class_attention_sdpa(q, k_self, v_self, k_patches, v_patches, index):
    """One rectangular attention per image over patches and own keys, with a mask of what each state attends to."""
    shape = class_attention_shape(q, k_self, v_self, k_patches, index)
    images, states, patches = shape[0], shape[1], k_patches.shape[1]
    queries = q.expand(shape).transpose(1, 2)
    keys, values = (
        torch.cat([of_patches, of_self.expand(shape)], dim=1).transpose(1, 2)
        for of_self, of_patches in ((k_self, k_patches), (v_self, v_patches))
    )
    if index is None and states == 1:
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
    attends = torch.ones(images, states, patches, dtype=torch.bool, device=q.device)
    if index is not None:  # missing neighbors go to a place behind the last patch
        attends = torch.zeros(images, states, patches + 1, dtype=torch.bool, device=q.device)
        attends = attends.scatter_(2, torch.where(index < 0, patches, index).long(), True)[:, :, :patches]
    own = torch.eye(states, dtype=torch.bool, device=q.device).expand(images, -1, -1)
    mask = torch.cat([attends, own], dim=2)[:, None]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)


def photometric_official(pixels, table, mean, std, dtype):
    """torchvision's operations on float tensors, one sample after the other, with the given parameters."""
    from torchvision.transforms.v2 import functional as tv

    jitters = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    out = []
    for image, row in zip(pixels, table.tolist(), strict=True):
        numbers = dict(zip(PHOTOMETRIC_COLUMNS, row, strict=True))
        amounts = [numbers[name] for name in ("brightness", "contrast", "saturation", "hue")]
        x = image.permute(2, 0, 1).float() / 255
        for kind in JITTER_ORDERS[int(numbers["order"])]:
            x = jitters[kind](x, amounts[kind])
        if numbers["gray"]:
            x = tv.rgb_to_grayscale(x, 3)
        reach = min(math.ceil(3 * numbers["sigma"]), min(x.shape[1:]) - 1)
        if reach:
            x = tv.gaussian_blur(x, [2 * reach + 1] * 2, [numbers["sigma"]] * 2)
        if numbers["solarize"] <= 255:
            x = tv.solarize(x, numbers["solarize"] / 255)
        out.append(tv.normalize(x, mean, std))
    return torch.stack(out).to(dtype)


def photometric_batched(pixels, table, mean, std, dtype):
    """Every operation on the whole batch, at each of the four places all four jitters; each sample keeps the results it needs."""
    x, column = pixels.movedim(-1, 1).float(), dict(zip(PHOTOMETRIC_COLUMNS, table.unbind(1), strict=True))
    orders = torch.tensor(JITTER_ORDERS, device=x.device)[column["order"].long()]
    for place in range(4):
        for kind, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            chosen = (orders[:, place] == kind)[:, None, None, None]
            x = torch.where(chosen, getattr(photometric_reference, name)(x, column[name]), x)
    x = torch.where((column["gray"] > 0)[:, None, None, None], photometric_reference.gray(x), x)
    blurred = photometric_reference.blur(x, column["sigma"].clamp(min=0.1))
    x = torch.where((column["sigma"] > 0)[:, None, None, None], blurred, x)
    x = torch.where(x >= column["solarize"][:, None, None, None], 255 - x, x)
    mean, std = (torch.tensor(c, device=x.device)[:, None, None] for c in (mean, std))
    return ((x / 255 - mean) / std).to(dtype)


def _prototype_probabilities(z, prototypes, temperature, bias=None):
    """Softmax in fp32 over all prototypes, as autocast does it."""
    logits = z @ prototypes.T
    return ((logits if bias is None else logits + bias) / temperature).softmax(dim=-1, dtype=torch.float32)


def prototype_ce_official(
    z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, pair_weight, row_weight, bias
):
    """As released: the logits of both branches, and for every pair of views a log-softmax and a product of that size."""
    with torch.no_grad():
        target = _prototype_probabilities(teacher_z, teacher_prototypes, teacher_temperature, bias)
    logits = z @ prototypes.T / temperature
    loss = 0
    for t in range(len(teacher_z)):
        for s in range(len(z)):
            if s == t and min(len(teacher_z), len(z)) > 1:
                continue  # a view is no target for itself
            cross_entropy = -(target[t] * logits[s].log_softmax(dim=-1, dtype=torch.float32)).sum(dim=-1)
            loss = loss + pair_weight[t, s] * (row_weight * cross_entropy).sum()
    return loss


def prototype_ce_smart(
    z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, pair_weight, row_weight, bias
):
    """One log-sum-exp per student view, and one vector per teacher row, as cross-entropy is linear in the target."""
    with torch.no_grad():
        target = _prototype_probabilities(teacher_z, teacher_prototypes, teacher_temperature, bias)
    pulls = (target.to(z.dtype) @ prototypes).float()
    pull = torch.einsum("ts,trd->srd", pair_weight, pulls)
    log_partition = (z @ prototypes.T / temperature).float().logsumexp(dim=-1)
    cross_entropy = pair_weight.sum(dim=0)[:, None] * log_partition - (z * pull).sum(dim=-1) / temperature
    return (cross_entropy * row_weight).sum()


def prototype_ce_lightly(
    z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, pair_weight, row_weight, bias
):
    """lightly's DINOLoss, or its IBOTPatchLoss for one view, on logits; all pairs and rows have the same weight there."""
    try:
        from lightly.loss import DINOLoss, IBOTPatchLoss
    except ImportError as problem:
        raise NotImplementedError("lightly is not installed; pip install 'patchlight[peers]'") from problem
    logits = z @ prototypes.T
    with torch.no_grad():
        teacher_logits = teacher_z @ teacher_prototypes.T
    if len(z) == len(teacher_z) == 1:
        loss = IBOTPatchLoss(len(prototypes), teacher_temperature, temperature).to(z.device)
        loss.center.center.copy_(-bias)
        mask = torch.ones(1, 1, z.shape[1], dtype=torch.bool, device=z.device)
        return loss(teacher_logits[0], logits[0], mask)
    loss = DINOLoss(len(prototypes), teacher_temp=teacher_temperature, student_temp=temperature).to(z.device)
    loss.center.copy_(-bias)
    return loss(list(teacher_logits), list(logits), teacher_temp=teacher_temperature)


def prototype_ce_way(way: str) -> Callable:
    """Our op as a user calls it with fp32 on a GPU, by one of its two ways: kernels that multiply, or cuBLAS in chunks."""

    def run(z, *others, **arguments):
        if z.dtype != torch.float32 or z.device.type != "cuda":
            raise NotImplementedError("only fp32 on a GPU can go both ways")
        with mock.patch.object(prototype_pieces, "WAY", way):
            return prototype_ce(z, *others, **arguments)

    return run


def _query_parts(
    qkv: Tensor, raw: int, query_keys: str, crop: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each stream, heads first; crops whose queries ignore each other become separate images."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    if query_keys == "raw":
        return (q[:, :, :raw], k[:, :, :raw], v[:, :, :raw]), (q[:, :, raw:], k[:, :, :raw], v[:, :, :raw])
    crops = 1 if crop is None or crop == qkv.shape[1] - raw else (qkv.shape[1] - raw) // crop
    by_crop = lambda x: x[:, :, raw:].unflatten(2, (crops, -1)).transpose(1, 2).flatten(0, 1)
    keys = lambda x: torch.cat([x[:, :, :raw].repeat_interleave(crops, dim=0), by_crop(x)], dim=2) if crops > 1 else x
    return (q[:, :, :raw], k[:, :, :raw], v[:, :, :raw]), (by_crop(q), keys(k), keys(v))


def _query_join(raw_out: Tensor, query_out: Tensor) -> Tensor:
    images, heads, _, width = raw_out.shape
    query_out = query_out.transpose(1, 2).reshape(images, -1, heads, width)
    return torch.cat([raw_out.transpose(1, 2), query_out], dim=1)


def query_attention_official(qkv, raw, query_keys, crop):
    """As released: a softmax attention for each stream, with both maps in memory."""
    outputs = []
    for q, k, v in _query_parts(qkv, raw, query_keys, crop):
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        outputs.append(attention.to(v.dtype) @ v)
    return _query_join(*outputs)


def query_attention_sdpa(qkv, raw, query_keys, crop):
    """PyTorch's fused attention once per stream."""
    raw_part, query_part = _query_parts(qkv, raw, query_keys, crop)
    if raw == qkv.shape[1]:
        return F.scaled_dot_product_attention(*raw_part).transpose(1, 2)
    return _query_join(F.scaled_dot_product_attention(*raw_part), F.scaled_dot_product_attention(*query_part))


def _query_attends(row, key, raw: int, query_keys: str, crop: int | None):
    """Whether a token (row) attends to a token (key)."""
    if query_keys == "raw":
        return (key < raw) & (row >= 0)
    siblings = row >= raw if crop is None else (row >= raw) & ((row - raw) // crop == (key - raw) // crop)
    return (key < raw) | siblings


def query_attention_masked(qkv, raw, query_keys, crop):
    """One call for both streams, with a mask."""
    token = torch.arange(qkv.shape[1], device=qkv.device)
    mask = _query_attends(token[:, None], token, raw, query_keys, crop)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _block_mask(tokens: int, raw: int, query_keys: str, crop: int | None, device: str):
    attends = lambda image, head, row, key: _query_attends(row, key, raw, query_keys, crop)
    return create_block_mask(attends, None, None, tokens, tokens, device=device)


def query_attention_flex(qkv, raw, query_keys, crop):
    """FlexAttention, whose mask skips blocks that no token attends to."""
    if qkv.device.type != "cuda":
        raise NotImplementedError("FlexAttention has a backward on GPUs only")
    mask = _block_mask(qkv.shape[1], raw, query_keys, crop, str(qkv.device))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return _compiled_flex()(q, k, v, block_mask=mask).transpose(1, 2)


MAP = 14  # positions along a side of a global view


def self_relation_official(student, teacher, student_scale, teacher_scale, weight):
    """As released: the relations of whole maps, several heads' sampled along keys and then along queries, softmax for every pair.

    It starts from maps that hold the given features in a corner, and samples at those: this gives the released sizes and work,
    and the result of an op on sampled features. So its time includes the double sampling, and no peer's includes the sampling of
    features, two small products. A global map has 14 x 14 positions, a local map as many as are sampled. One head is a channel
    relation, which is not sampled.
    """
    points = math.isqrt(student.shape[3])
    sampled = student.shape[2] > 1 and points**2 == student.shape[3] and points < MAP
    loss = 0
    for s in range(len(student)):
        with torch.no_grad():
            target = _official_relation(teacher, teacher_scale, points, MAP if sampled else 0).softmax(dim=-1)
        local = points < MAP - 1
        relation = _official_relation(student[s], student_scale, points, (points if local else MAP) if sampled else 0)
        cross_entropy = -(target * relation.log_softmax(dim=-1)).sum(dim=-1)
        loss = loss + (weight[s] * cross_entropy.mean(dim=(-1, -2))).sum()
    return loss


def _official_relation(features: Tensor, scale: float, points: int, side: int) -> Tensor:
    """In fp32, sampled at the first points x points positions of a side x side map, or of the features as they are."""
    if not side:
        return (features @ features.mT).float() * scale
    maps = features.unflatten(-2, (points, points))
    maps = F.pad(maps, (0, 0, 0, side - points, 0, side - points)).flatten(-3, -2)
    relation = (maps @ maps.mT * scale).float()
    at = (2 * torch.arange(points, dtype=torch.float32, device=features.device) + 1) / side - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1).expand(len(features), -1, -1, -1)
    for _ in range(2):
        planes = relation.flatten(1, 2).unflatten(-1, (side, side))
        relation = F.grid_sample(planes, grid, align_corners=False).flatten(2).unflatten(1, (features.shape[1], -1)).mT
    return relation


def self_relation_smart(student, teacher, student_scale, teacher_scale, weight):
    """From sampled features: one softmax of the teacher for all views, and only the log-sum-exp of the student."""
    with torch.no_grad():
        target = (teacher_scale * (teacher @ teacher.mT)).softmax(dim=-1, dtype=torch.float32)
    relation = student_scale * (student @ student.mT).float()
    cross_entropy = relation.logsumexp(dim=-1) - (target * relation).sum(dim=-1)
    return (weight * cross_entropy.mean(dim=(-1, -2))).sum()


def _compiled(**peers: Callable) -> dict[str, Callable]:
    return {f"compile({name})": torch.compile(peer, dynamic=False) for name, peer in peers.items()}


# The first peer is the official mathematics; the speedups of a table are against it.
PEERS: dict[str, dict[str, Callable]] = {
    "class_attention": {
        "official eager": class_attention_official,
        "smart eager": class_attention_smart,
        "masked SDPA": class_attention_sdpa,
        **_compiled(official=class_attention_official, smart=class_attention_smart, SDPA=class_attention_sdpa),
    },
    "neighbor_topk": {
        "official eager": neighbor_topk_official,
        "dense eager": neighbor_topk_dense,
        "reference": neighbor_topk_reference,
        **_compiled(official=neighbor_topk_official, dense=neighbor_topk_dense),
    },
    "photometric": {
        "torchvision per sample": photometric_official,
        "batched eager": photometric_batched,
        "reference": photometric_reference.photometric_fwd,
        **_compiled(batched=photometric_batched),
    },
    "prototype_ce": {
        "official eager": prototype_ce_official,
        "smart eager": prototype_ce_smart,
        "lightly": prototype_ce_lightly,
        "ours by kernels that multiply": prototype_ce_way("stream"),
        "ours by chunks": prototype_ce_way("chunks"),
        **_compiled(official=prototype_ce_official, smart=prototype_ce_smart),
    },
    "query_attention": {
        "official eager": query_attention_official,
        "SDPA, two calls": query_attention_sdpa,
        "SDPA, masked": query_attention_masked,
        "FlexAttention": query_attention_flex,
        **_compiled(official=query_attention_official, SDPA=query_attention_sdpa),
    },
    "self_relation": {
        "official eager": self_relation_official,
        "smart eager": self_relation_smart,
        **_compiled(official=self_relation_official, smart=self_relation_smart),
    },
}
