"""What a user would run instead of an op, by op: faithful ports of the official mathematics, dense forms, libraries.

Each peer takes the public function's arguments and returns something comparable. None of them is ours to tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from patchlight_kernels import JITTER_ORDERS, PHOTOMETRIC_COLUMNS
from patchlight_kernels.ops.class_attention.reference import state_shape as class_attention_shape
from patchlight_kernels.ops.neighbor_topk import reference as neighbor_reference
from patchlight_kernels.ops.photometric import reference as photometric_reference

_tables: dict[tuple, Tensor] = {}


def _table(*key) -> Tensor:
    """The neighbor table of (height, width, radius, wrap, device), made once, as the release does for its two grids."""
    if key not in _tables:
        height, width, radius, wrap, device = key
        _tables[key] = neighbor_reference.neighborhood(height, width, -1 if radius is None else radius, wrap).to(device)
    return _tables[key]


def neighbor_topk_official(x, grid, k, radius, border, return_scores):
    """As released: normalise, gather every patch's neighbors into [B, N, C, D], multiply, top-k."""
    if radius is None:
        raise NotImplementedError("the release has no all-patches form: gathering it takes B * N * N * D values")
    table = _table(*grid, radius, border == "wrap", str(x.device))
    unit = F.normalize(x, dim=-1)
    similarity = (unit[:, table] @ unit.unsqueeze(-1)).squeeze(-1)
    score, slot = similarity.topk(k, dim=-1)
    index = table.expand(x.shape[0], -1, -1).gather(2, slot)
    return index, score


def neighbor_topk_dense(x, grid, k, radius, border, return_scores):
    """The whole Gram matrix, everything outside the window masked away, top-k."""
    table = _table(*grid, radius, border == "wrap", str(x.device))
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device).scatter_(1, table, 0.0)
    unit = F.normalize(x, dim=-1)
    score, index = (unit @ unit.transpose(1, 2) + mask).topk(k, dim=-1)
    return index, score


def neighbor_topk_reference(x, grid, k, radius, border, return_scores):
    radius = -1 if radius is None else radius
    return neighbor_reference.neighbor_topk_fwd(x, *grid, k, radius, border == "wrap", return_scores)


def class_attention_official(q, k_self, v_self, k_patches, v_patches, index):
    """As released: keys and values gathered into copies [M, Q, 1 + k, H, E], attention over each; nobody may be missing."""
    shape = class_attention_shape(q, k_self, v_self, k_patches, index)
    own = lambda x: x.expand(shape)[:, :, None]
    keys, values = (
        torch.cat([own(mine), _copies(theirs, index, shape)], dim=2).transpose(2, 3)  # [M, Q, H, 1 + k, E]
        for mine, theirs in ((k_self, k_patches), (v_self, v_patches))
    )
    scores = own(q).transpose(2, 3) @ keys.transpose(-2, -1) * shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ values).squeeze(3)


def _copies(x: Tensor, index: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The rows that each state reads, [M, Q, k, H, E]."""
    if index is None:
        return x[:, None].expand(-1, shape[1], -1, -1, -1)
    places = index.long().flatten(1)[:, :, None, None].expand(-1, -1, *shape[2:])
    return x.gather(1, places).unflatten(1, index.shape[1:])


def class_attention_smart(q, k_self, v_self, k_patches, v_patches, index):
    """The own key and the gathered ones without joining them, missing ones masked."""
    shape = class_attention_shape(q, k_self, v_self, k_patches, index)
    q, k_self, v_self = (x.expand(shape) for x in (q, k_self, v_self))
    keys, values = k_patches, v_patches
    read = "mnhe"
    if index is not None:
        read = "mqnhe"
        image = torch.arange(shape[0], device=q.device)[:, None, None]
        keys, values = (x[image, index.long().clamp(min=0)] for x in (k_patches, v_patches))
    scores = torch.einsum(f"mqhe,{read}->mqhn", q, keys)
    if index is not None:
        scores = scores.masked_fill((index < 0)[:, :, None], -torch.inf)
    own_score = (q * k_self).sum(dim=-1, keepdim=True)
    weights = (torch.cat([own_score, scores], dim=-1) * shape[-1] ** -0.5).softmax(dim=-1)
    return weights[..., :1] * v_self + torch.einsum(f"mqhn,{read}->mqhe", weights[..., 1:], values)


def class_attention_sdpa(q, k_self, v_self, k_patches, v_patches, index):
    """One rectangular attention per image over patches and own keys, a mask saying who reads whom."""
    shape = class_attention_shape(q, k_self, v_self, k_patches, index)
    images, states, patches = shape[0], shape[1], k_patches.shape[1]
    queries = q.expand(shape).transpose(1, 2)
    keys, values = (
        torch.cat([theirs, mine.expand(shape)], dim=1).transpose(1, 2)
        for mine, theirs in ((k_self, k_patches), (v_self, v_patches))
    )
    if index is None and states == 1:
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
    reads = torch.ones(images, states, patches, dtype=torch.bool, device=q.device)
    if index is not None:  # a place behind the last patch takes the missing ones
        reads = torch.zeros(images, states, patches + 1, dtype=torch.bool, device=q.device)
        reads = reads.scatter_(2, torch.where(index < 0, patches, index).long(), True)[:, :, :patches]
    own = torch.eye(states, dtype=torch.bool, device=q.device).expand(images, -1, -1)
    mask = torch.cat([reads, own], dim=2)[:, None]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)


def photometric_official(pixels, table, mean, std, dtype):
    """torchvision's operations on float tensors, one sample after the other, with the numbers that its transforms would draw."""
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
    """Every operation on the whole batch, at each of the four places all four jitters; those who want it keep the result."""
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
        wanted = _prototype_probabilities(teacher_z, teacher_prototypes, teacher_temperature, bias)
    logits = z @ prototypes.T / temperature
    loss = 0
    for t in range(len(teacher_z)):
        for s in range(len(z)):
            if s == t and min(len(teacher_z), len(z)) > 1:
                continue  # a view does not teach itself
            cross_entropy = -(wanted[t] * logits[s].log_softmax(dim=-1, dtype=torch.float32)).sum(dim=-1)
            loss = loss + pair_weight[t, s] * (row_weight * cross_entropy).sum()
    return loss


def prototype_ce_smart(
    z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, pair_weight, row_weight, bias
):
    """One log-sum-exp per student view; a teacher row costs one vector, as cross-entropy is linear in the target."""
    with torch.no_grad():
        wanted = _prototype_probabilities(teacher_z, teacher_prototypes, teacher_temperature, bias)
    pulls = (wanted.to(z.dtype) @ prototypes).float()
    pull = torch.einsum("ts,trd->srd", pair_weight, pulls)
    log_partition = (z @ prototypes.T / temperature).float().logsumexp(dim=-1)
    cross_entropy = pair_weight.sum(dim=0)[:, None] * log_partition - (z * pull).sum(dim=-1) / temperature
    return (cross_entropy * row_weight).sum()


# The first peer is the official mathematics; the speedups of a table are against it.
PEERS: dict[str, dict[str, Callable]] = {
    "class_attention": {
        "official eager": class_attention_official,
        "smart eager": class_attention_smart,
        "masked SDPA": class_attention_sdpa,
        "compile(official)": torch.compile(class_attention_official, dynamic=False),
        "compile(smart)": torch.compile(class_attention_smart, dynamic=False),
        "compile(SDPA)": torch.compile(class_attention_sdpa, dynamic=False),
    },
    "neighbor_topk": {
        "official eager": neighbor_topk_official,
        "dense eager": neighbor_topk_dense,
        "reference": neighbor_topk_reference,
        "compile(official)": torch.compile(neighbor_topk_official, dynamic=False),
        "compile(dense)": torch.compile(neighbor_topk_dense, dynamic=False),
    },
    "photometric": {
        "torchvision per sample": photometric_official,
        "batched eager": photometric_batched,
        "reference": photometric_reference.photometric_fwd,
        "compile(batched)": torch.compile(photometric_batched, dynamic=False),
    },
    "prototype_ce": {
        "official eager": prototype_ce_official,
        "smart eager": prototype_ce_smart,
        "compile(official)": torch.compile(prototype_ce_official, dynamic=False),
        "compile(smart)": torch.compile(prototype_ce_smart, dynamic=False),
    },
}
