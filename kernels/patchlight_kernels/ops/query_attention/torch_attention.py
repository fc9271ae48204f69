"""query_attention by PyTorch's own fused attention: a call for the raw tokens and one for the queries, which read the packed
projection where it lies. The op hands each backward its output and log-sum-exp, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import hardware
from .reference import scale_of

aten = torch.ops.aten
WIDTH, WIDTH_STEP = 256, 8  # of a head, in FlashAttention
ALIGNMENT = 16  # bytes that it reads at once


def no_flash_attention(qkv: Tensor) -> str | None:
    """Why PyTorch's FlashAttention does not take this projection."""
    if not qkv.is_cuda:
        return f"the tensors are on {qkv.device.type}, where PyTorch's fused attention loses a NaN or does not exist"
    if qkv.dtype == torch.float32:
        return "PyTorch's FlashAttention takes 16-bit numbers only"
    width = qkv.shape[-1]
    if width > WIDTH or width % WIDTH_STEP:
        return (
            f"PyTorch's FlashAttention takes heads of {WIDTH_STEP}, {2 * WIDTH_STEP}, ... {WIDTH} channels, not {width}"
        )
    if any(count * qkv.element_size() % ALIGNMENT for count in (qkv.storage_offset(), *qkv.stride()[:-1])):
        return f"its rows do not begin at multiples of {ALIGNMENT} bytes, as PyTorch's FlashAttention reads them"
    return hardware.gpu_too_old(qkv)


def several_crops(qkv: Tensor, raw: int, crop: int) -> str | None:
    """Why the keys of a query are not one slice."""
    return "a query of one crop of several reads keys that are not adjacent" if 0 < crop < qkv.shape[1] - raw else None


def query_attention_fwd(qkv: Tensor, raw: int, crop: int) -> tuple[Tensor, Tensor]:
    """Takes the arguments of `patchlight::query_attention_fwd`: the output [M, T, H, E] and its log-sum-exp [M, H, T]."""
    images, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(images, tokens, heads, width)
    lse = qkv.new_empty(images, heads, tokens, dtype=torch.float32)
    q, k, v = heads_of(qkv)
    for rows, keys in streams(tokens, raw, crop):
        part, sums = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys])
        out[:, rows], lse[:, :, rows] = part.transpose(1, 2), sums
    return out, lse


def query_attention_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, raw: int, crop: int) -> Tensor:
    """The gradient of qkv, packed like it."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    (dq, dk, dv), (q, k, v) = heads_of(dqkv), heads_of(qkv)
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    if not crop:
        dqkv[:, raw:, 1:] = 0  # of queries that no token reads
    for number, (rows, keys) in enumerate(streams(qkv.shape[1], raw, crop)):
        of_rows = (x[:, :, rows] for x in (grad, out, lse))
        dq[:, :, rows], *of_keys = attend_backward(q[:, :, rows], k[:, :, keys], v[:, :, keys], *of_rows)
        for whole, part in zip((dk[:, :, keys], dv[:, :, keys]), of_keys, strict=True):
            _ = whole.add_(part) if number else whole.copy_(part)
    return dqkv


def streams(tokens: int, raw: int, crop: int) -> Iterator[tuple[slice, slice]]:
    """Rows and the keys that they read: of the queries, if there are some, and of the raw tokens, which read no others."""
    if tokens > raw:
        yield slice(raw, tokens), slice(tokens if crop else raw)
    yield slice(raw), slice(raw)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of [M, H, Q, E] over [M, H, K, E], and its log-sum-exp [M, H, Q]."""
    scale = scale_of(q.shape[-1])
    if q.is_cuda:
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def attend_backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """The gradients of q, k and v in `attend`, whose results were out and lse."""
    scale, dropout, causal = scale_of(q.shape[-1]), 0.0, False
    if not q.is_cuda:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(g, q, k, v, out, lse, dropout, causal, scale=scale)
    unread = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of dropout
    lengths = None, None, q.shape[2], k.shape[2]  # None: all images have equally many tokens
    backward = aten._scaled_dot_product_flash_attention_backward
    return backward(g, q, k, v, out, lse.contiguous(), *lengths, dropout, causal, unread, unread, scale=scale)


def heads_of(qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [M, H, T, E] of a packed [M, T, 3, H, E]."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)
