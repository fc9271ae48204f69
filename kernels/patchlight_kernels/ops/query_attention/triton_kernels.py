"""Triton kernels of query_attention. A block of rows, or of keys, lies within one segment (the raw tokens, or a crop of queries),
so that its program reads only what its rows, or its keys, need.

Scores are in units of log2. The backward computes probabilities again from the saved log-sum-exp: one kernel for the
gradients of the rows, one for those of keys and values, each block of which sums over the rows that read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_functions import LN2, LOWEST, at_most_zero, dot, store
from ...tuning import autotune
from .reference import scale_of

LOG2E = tl.constexpr(1 / math.log(2))
ONE_TILE = 256  # keys of a row that fit on chip at once: a softmax without rescaling


@triton.jit
def _load(ptr, tokens, stride, mask, offs_e, WIDTH: tl.constexpr):
    """The rows of some tokens [BLOCK, BLOCK_E], zeros where masked."""
    at = tokens.to(tl.int64)[:, None] * stride + offs_e[None, :]
    return tl.load(ptr + at, mask=mask[:, None] & (offs_e < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(ptr, tokens, stride, mask, offs_e, x, WIDTH: tl.constexpr):
    """Stores the rows of some tokens."""
    at = tokens.to(tl.int64)[:, None] * stride + offs_e[None, :]
    store(ptr + at, x, mask[:, None] & (offs_e < WIDTH)[None, :])


@triton.jit
def _block(TOKENS: tl.constexpr, RAW: tl.constexpr, EACH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's image and head; first token of its segment, first and last token of its block.

    All programs are along x, as y has room for 65535 only.
    """
    raw_blocks: tl.constexpr = (RAW + BLOCK - 1) // BLOCK
    crop_blocks: tl.constexpr = (EACH + BLOCK - 1) // BLOCK
    blocks: tl.constexpr = raw_blocks + (TOKENS - RAW) // max(EACH, 1) * crop_blocks
    sequence, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start, first, end = 0, block * BLOCK, RAW
    if block >= raw_blocks:
        start = RAW + (block - raw_blocks) // crop_blocks * EACH
        first = start + (block - raw_blocks) % crop_blocks * BLOCK
        end = start + EACH
    return (
        (sequence // HEADS).to(tl.int64),
        (sequence % HEADS).to(tl.int64),
        start,
        first,
        tl.minimum(first + BLOCK, end),
    )


@triton.jit
def _key_tokens(offs_n, start, RAW: tl.constexpr, OWN: tl.constexpr):
    """The tokens of the keys that a row reads, in its own order: the raw ones and, if OWN, those of its segment."""
    if OWN:
        return tl.where(offs_n < RAW, offs_n, offs_n - RAW + start)
    return offs_n


@triton.jit
def _scores(q, k, mask_n, scale):
    """Scores of the rows for some keys, -inf for keys that do not exist."""
    return tl.where(mask_n[None, :], dot(q, tl.trans(k), None) * scale, -float("inf"))


@triton.jit
def _attend(
    block,
    RAW: tl.constexpr,
    KEYS: tl.constexpr,  # RAW, or RAW + EACH for a query that reads its segment too
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The output of a block of rows, and log2 of the sum of its powers."""
    q, k_ptr, v_ptr, stride_t, start, scale, offs_e = block
    scale *= LOG2E
    if KEYS <= BLOCK_N:
        offs_n = tl.arange(0, BLOCK_N)
        mask_n = offs_n < KEYS
        tokens = _key_tokens(offs_n, start, RAW, KEYS > RAW)
        k = _load(k_ptr, tokens, stride_t, mask_n, offs_e, WIDTH)
        scores = _scores(q, k, mask_n, scale)
        top = tl.maximum(tl.max(scores, axis=1), LOWEST)
        p = tl.exp2(scores - top[:, None])
        total = tl.sum(p, axis=1)
        v = _load(v_ptr, tokens, stride_t, mask_n, offs_e, WIDTH)
        acc = dot(p, v, None)
    else:
        top = tl.full((q.shape[0],), LOWEST, tl.float32)
        total = tl.zeros((q.shape[0],), tl.float32)
        acc = tl.zeros(q.shape, tl.float32)
        for first in range(0, KEYS, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            mask_n = offs_n < KEYS
            tokens = _key_tokens(offs_n, start, RAW, KEYS > RAW)
            k = _load(k_ptr, tokens, stride_t, mask_n, offs_e, WIDTH)
            scores = _scores(q, k, mask_n, scale)
            higher = tl.maximum(tl.max(scores, axis=1), top)
            p = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            v = _load(v_ptr, tokens, stride_t, mask_n, offs_e, WIDTH)
            acc = acc * shrink[:, None] + dot(p, v, None)
            total = total * shrink + tl.sum(p, axis=1)
            top = higher
    return acc / total[:, None], top + tl.log2(total)


@triton.jit
def _fwd_kernel(
    qkv_ptr,  # [M, TOKENS, 3, HEADS, WIDTH]
    out_ptr,  # out: [M, TOKENS, HEADS, WIDTH]
    lse_ptr,  # out: [M, HEADS, TOKENS] fp32
    strides,  # of image, token, part and head in qkv
    scale,
    TOKENS: tl.constexpr,
    RAW: tl.constexpr,
    EACH: tl.constexpr,  # queries of a segment
    OWN: tl.constexpr,  # whether they read their segment
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows of one head."""
    stride_m, stride_t, stride_part, stride_h = strides
    image, head, start, first, end = _block(TOKENS, RAW, EACH, HEADS, BLOCK_M)
    qkv_ptr += image * stride_m + head * stride_h
    k_ptr, v_ptr = qkv_ptr + stride_part, qkv_ptr + 2 * stride_part
    offs_m, offs_e = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    mask_m = offs_m < end
    q = _load(qkv_ptr, offs_m, stride_t, mask_m, offs_e, WIDTH)
    block = q, k_ptr, v_ptr, stride_t, start, scale, offs_e
    if start == 0 or not OWN:
        out, log2_sum = _attend(block, RAW, RAW, WIDTH, BLOCK_N)
    else:
        out, log2_sum = _attend(block, RAW, RAW + EACH, WIDTH, BLOCK_N)
    _store(out_ptr + (image * TOKENS * HEADS + head) * WIDTH, offs_m, HEADS * WIDTH, mask_m, offs_e, out, WIDTH)
    tl.store(lse_ptr + (image * HEADS + head) * TOKENS + offs_m, log2_sum * LN2, mask=mask_m)


@triton.jit
def _sum_over_keys(block, RAW: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of dS k over the keys that a block of rows reads."""
    q, g, delta, log2_sum, k_ptr, v_ptr, stride_t, start, scale, offs_e = block
    scale *= LOG2E
    dq = tl.zeros(q.shape, tl.float32)
    for first in range(0, KEYS, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < KEYS
        tokens = _key_tokens(offs_n, start, RAW, KEYS > RAW)
        k = _load(k_ptr, tokens, stride_t, mask_n, offs_e, WIDTH)
        v = _load(v_ptr, tokens, stride_t, mask_n, offs_e, WIDTH)
        p = tl.exp2(at_most_zero(_scores(q, k, mask_n, scale) - log2_sum[:, None]))
        d_scores = p * (dot(g, tl.trans(v), None) - delta[:, None])
        dq += dot(d_scores, k, None)
    return dq


@triton.jit
def _rows_bwd_kernel(
    grad_ptr,  # [M, TOKENS, HEADS, WIDTH]
    qkv_ptr,  # [M, TOKENS, 3, HEADS, WIDTH]
    out_ptr,  # [M, TOKENS, HEADS, WIDTH]
    lse_ptr,  # [M, HEADS, TOKENS] fp32
    delta_ptr,  # out: [M, HEADS, TOKENS] fp32, sum(g out) = sum(P dP)
    dqkv_ptr,  # out: [M, TOKENS, 3, HEADS, WIDTH], the queries' part
    strides,  # of image, token, part and head in qkv
    grad_strides,  # of image, token and head
    scale,
    TOKENS: tl.constexpr,
    RAW: tl.constexpr,
    EACH: tl.constexpr,
    OWN: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows of one head."""
    stride_m, stride_t, stride_part, stride_h = strides
    image, head, start, first, end = _block(TOKENS, RAW, EACH, HEADS, BLOCK_M)
    qkv_ptr += image * stride_m + head * stride_h
    k_ptr, v_ptr = qkv_ptr + stride_part, qkv_ptr + 2 * stride_part
    grad_ptr += image * grad_strides[0] + head * grad_strides[2]
    out_ptr += (image * TOKENS * HEADS + head) * WIDTH
    dqkv_ptr += (image * TOKENS * 3 * HEADS + head) * WIDTH
    offs_m, offs_e = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    mask_m = offs_m < end
    at = (image * HEADS + head) * TOKENS + offs_m
    q = _load(qkv_ptr, offs_m, stride_t, mask_m, offs_e, WIDTH)
    g = _load(grad_ptr, offs_m, grad_strides[1], mask_m, offs_e, WIDTH)
    out = _load(out_ptr, offs_m, HEADS * WIDTH, mask_m, offs_e, WIDTH)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + at, delta, mask=mask_m)
    log2_sum = tl.load(lse_ptr + at, mask=mask_m, other=float("inf")) * LOG2E
    block = q, g, delta, log2_sum, k_ptr, v_ptr, stride_t, start, scale, offs_e
    if start == 0 or not OWN:
        dq = _sum_over_keys(block, RAW, RAW, WIDTH, BLOCK_N)
    else:
        dq = _sum_over_keys(block, RAW, RAW + EACH, WIDTH, BLOCK_N)
    _store(dqkv_ptr, offs_m, 3 * HEADS * WIDTH, mask_m, offs_e, dq * scale, WIDTH)


@triton.jit
def _sums_over_rows(block, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """For a block of keys the sums of dS^T q and P^T g over the ROWS rows from `start` on, which read them."""
    k, v, qkv_ptr, grad_ptr, lse_ptr, delta_ptr, stride_t, grad_stride_t, start, scale, offs_e = block
    scale *= LOG2E
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(k.shape, tl.float32)
    for first in range(0, ROWS, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < ROWS
        offs_m += start
        q = _load(qkv_ptr, offs_m, stride_t, mask_m, offs_e, WIDTH)
        g = _load(grad_ptr, offs_m, grad_stride_t, mask_m, offs_e, WIDTH)
        log2_sum = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
        p = tl.exp2(at_most_zero(dot(k, tl.trans(q), None) * scale - log2_sum[None, :]))  # [keys, rows]
        dv += dot(p, g, None)
        d_scores = p * (dot(v, tl.trans(g), None) - delta[None, :])
        dk += dot(d_scores, q, None)
    return dk, dv


@triton.jit
def _keys_bwd_kernel(
    grad_ptr,  # [M, TOKENS, HEADS, WIDTH]
    qkv_ptr,  # [M, TOKENS, 3, HEADS, WIDTH]
    lse_ptr,  # [M, HEADS, TOKENS] fp32
    delta_ptr,  # [M, HEADS, TOKENS] fp32
    dqkv_ptr,  # out: [M, TOKENS, 3, HEADS, WIDTH], the parts of keys and values
    strides,  # of image, token, part and head in qkv
    grad_strides,  # of image, token and head
    scale,
    TOKENS: tl.constexpr,
    RAW: tl.constexpr,
    EACH: tl.constexpr,
    OWN: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N keys of one head: every token reads raw keys, a query's key is read by its segment or not at all."""
    stride_m, stride_t, stride_part, stride_h = strides
    image, head, start, first, end = _block(TOKENS, RAW, EACH, HEADS, BLOCK_N)
    qkv_ptr += image * stride_m + head * stride_h
    grad_ptr += image * grad_strides[0] + head * grad_strides[2]
    lse_ptr += (image * HEADS + head) * TOKENS
    delta_ptr += (image * HEADS + head) * TOKENS
    dqkv_ptr += (image * TOKENS * 3 * HEADS + head) * WIDTH
    offs_n, offs_e = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    mask_n = offs_n < end
    k = _load(qkv_ptr + stride_part, offs_n, stride_t, mask_n, offs_e, WIDTH)
    v = _load(qkv_ptr + 2 * stride_part, offs_n, stride_t, mask_n, offs_e, WIDTH)
    block = k, v, qkv_ptr, grad_ptr, lse_ptr, delta_ptr, stride_t, grad_strides[1], start, scale, offs_e
    if start == 0:
        dk, dv = _sums_over_rows(block, TOKENS, WIDTH, BLOCK_M)
    else:
        dk, dv = _sums_over_rows(block, EACH if OWN else 0, WIDTH, BLOCK_M)
    _store(dqkv_ptr + HEADS * WIDTH, offs_n, 3 * HEADS * WIDTH, mask_n, offs_e, dk * scale, WIDTH)
    _store(dqkv_ptr + 2 * HEADS * WIDTH, offs_n, 3 * HEADS * WIDTH, mask_n, offs_e, dv, WIDTH)


def _configs(*tiles: tuple[int, int | None, int, int]) -> list[triton.Config]:
    """From (BLOCK_M, BLOCK_N or None if the launcher gives it, warps, stages)."""
    return [
        triton.Config({"BLOCK_M": m} | ({"BLOCK_N": n} if n else {}), num_warps=warps, num_stages=stages)
        for m, n, warps, stages in tiles
    ]


# fp32 products do not use tensor cores, and older tensor cores keep their operands in registers: tiles are small where several
# products follow one another.
KEY = ["TOKENS", "RAW", "EACH", "OWN", "WIDTH"]
_one_tile_fwd = autotune(_configs((16, None, 4, 1), (32, None, 8, 1)), key=KEY)(_fwd_kernel)
_fwd = autotune(_configs((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2)), key=KEY)(_fwd_kernel)
_rows_bwd = autotune(_configs((64, 32, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2)), key=KEY)(_rows_bwd_kernel)
_keys_bwd = autotune(_configs((32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2)), key=KEY)(_keys_bwd_kernel)
_float32_fwd = autotune(_configs((32, 32, 8, 2), (16, 32, 4, 2)), key=KEY)(_fwd_kernel)
_float32_rows_bwd = autotune(_configs((16, 32, 4, 2), (16, 16, 4, 2)), key=KEY)(_rows_bwd_kernel)
_float32_keys_bwd = autotune(_configs((16, 16, 4, 2), (32, 16, 4, 2)), key=KEY)(_keys_bwd_kernel)


def _sizes(qkv: Tensor, raw: int, crop: int) -> dict[str, int]:
    """What all kernels are compiled for."""
    tokens, _, heads, width = qkv.shape[1:]
    return {
        "TOKENS": tokens,
        "RAW": raw,
        "EACH": crop or tokens - raw,
        "OWN": crop > 0,
        "HEADS": heads,
        "WIDTH": width,
        "BLOCK_E": max(16, triton.next_power_of_2(width)),
    }


def _grid(qkv: Tensor, sizes: dict[str, int], block: str) -> Callable[[dict[str, int]], tuple[int]]:
    """Blocks of all segments, for every head of every image."""

    def grid(meta):
        each, queries = sizes["EACH"], sizes["TOKENS"] - sizes["RAW"]
        crops = queries // each if each else 0
        blocks = triton.cdiv(sizes["RAW"], meta[block]) + crops * triton.cdiv(each, meta[block])
        return (blocks * qkv.shape[0] * sizes["HEADS"],)

    return grid


def query_attention_fwd(qkv: Tensor, raw: int, crop: int) -> tuple[Tensor, Tensor]:
    """Raw arguments as `patchlight::query_attention_fwd`: the output [M, T, H, E] and its log-sum-exp [M, H, T]."""
    images, tokens, _, heads, width = qkv.shape
    sizes = _sizes(qkv, raw, crop)
    out, lse = qkv.new_empty(images, tokens, heads, width), qkv.new_empty(images, heads, tokens, dtype=torch.float32)
    keys = raw + crop
    arguments = qkv, out, lse, qkv.stride()[:4], scale_of(width)
    if qkv.dtype == torch.float32:
        _float32_fwd[_grid(qkv, sizes, "BLOCK_M")](*arguments, **sizes)
    elif keys <= ONE_TILE:
        _one_tile_fwd[_grid(qkv, sizes, "BLOCK_M")](*arguments, **sizes, BLOCK_N=max(16, triton.next_power_of_2(keys)))
    else:
        _fwd[_grid(qkv, sizes, "BLOCK_M")](*arguments, **sizes)
    return out, lse


def query_attention_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, raw: int, crop: int) -> Tensor:
    """The gradient of qkv, packed like it."""
    sizes = _sizes(qkv, raw, crop)
    dqkv, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    strides = qkv.stride()[:4], grad.stride()[:3], scale_of(qkv.shape[-1])
    rows, keys = (_float32_rows_bwd, _float32_keys_bwd) if qkv.dtype == torch.float32 else (_rows_bwd, _keys_bwd)
    rows[_grid(qkv, sizes, "BLOCK_M")](grad, qkv, out, lse, delta, dqkv, *strides, **sizes)
    keys[_grid(qkv, sizes, "BLOCK_N")](grad, qkv, lse, delta, dqkv, *strides, **sizes)
    return dqkv
