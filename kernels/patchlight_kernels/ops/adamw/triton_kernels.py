"""Triton kernels of adamw: the numbers of every parameter's step, then a program for each chunk of a parameter."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...addresses import CHUNK
from ...triton_functions import store
from .op import DECAYED, FROZEN, WITH_GRADIENT, prepared

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_CHUNK = tl.constexpr(CHUNK)
_DECAYED, _FROZEN, _WITH_GRADIENT = tl.constexpr(DECAYED), tl.constexpr(FROZEN), tl.constexpr(WITH_GRADIENT)


@triton.jit
def _numbers_kernel(
    table_ptr,  # [9, count] int64: values, flags, then the addresses of the lists
    steps_ptr,  # [count] fp32
    scale_ptr,  # [count] fp32
    lr_ptr,  # fp64, as the next three
    decay_ptr,
    momentum_ptr,
    freeze_ptr,
    refused_ptr,  # fp32
    out_ptr,  # [5, count] fp32: scale, decay, rate, root, and the teacher's part that is new
    count,
    log_beta1,
    log_beta2,
    BLOCK: tl.constexpr,
):
    """What a step needs of each parameter; the rate is NaN where it does not move. Moves the step counts."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < count
    if tl.load(refused_ptr) > 0:
        return
    lr, decay = tl.load(lr_ptr), tl.load(decay_ptr)
    flags = tl.load(table_ptr + count + offs, mask=inside, other=0)
    moves = ((flags & _WITH_GRADIENT) != 0) & ((flags & tl.where(tl.load(freeze_ptr) > 0, _FROZEN, 0)) == 0)
    steps = tl.load(steps_ptr + offs, mask=inside, other=0) + tl.where(moves, 1.0, 0.0)
    tl.store(steps_ptr + offs, steps, mask=inside)
    exact = tl.maximum(steps, 1.0).to(tl.float64)
    rate = lr / (1 - tl.exp(exact * log_beta1))
    root = 1 / tl.sqrt(1 - tl.exp(exact * log_beta2))
    out_ptr += offs
    tl.store(out_ptr, tl.load(scale_ptr + offs, mask=inside, other=0), mask=inside)
    decays = (flags & _DECAYED) != 0
    tl.store(out_ptr + count, tl.where(decays, 1 - lr * decay, 1.0).to(tl.float32), mask=inside)
    tl.store(out_ptr + 2 * count, tl.where(moves, rate, float("nan")).to(tl.float32), mask=inside)
    tl.store(out_ptr + 3 * count, root.to(tl.float32), mask=inside)
    share = (1 - tl.load(momentum_ptr)).to(tl.float32) + tl.zeros([BLOCK], dtype=tl.float32)
    tl.store(out_ptr + 4 * count, share, mask=inside)


@triton.jit
def _pointer(table_ptr, row, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a chunk begins in the tensor of that row; 0 if there is no tensor."""
    address = tl.load(table_ptr + row)
    address = tl.where(address == 0, 0, address + first * (TYPE.primitive_bitwidth // 8))
    if ALIGNED:
        address = tl.multiple_of(address, 8)
        if TYPE.primitive_bitwidth == 32:
            address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _sweep_kernel(
    table_ptr,  # [9, count] int64
    blocks_ptr,  # [2, blocks] int32: parameter, chunk
    numbers_ptr,  # [5, count] fp32
    refused_ptr,  # fp32
    count,
    blocks,
    beta1_rest,  # 1 - beta1
    beta2,
    beta2_rest,
    eps,
    GRADIENT: tl.constexpr,  # types
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16
    BLOCK: tl.constexpr,
):
    """One chunk of a parameter, with all that belongs to it."""
    if tl.load(refused_ptr) > 0:
        return
    block = tl.program_id(0)
    number = tl.load(blocks_ptr + block)
    first = tl.load(blocks_ptr + blocks + block).to(tl.int64) * _CHUNK
    table_ptr += number
    numbers_ptr += number
    left = tl.load(table_ptr) - first
    scale, decay = tl.load(numbers_ptr), tl.load(numbers_ptr + count)
    rate, root = tl.load(numbers_ptr + 2 * count), tl.load(numbers_ptr + 3 * count)
    share = tl.load(numbers_ptr + 4 * count)
    p_at = _pointer(table_ptr, 2 * count, first, tl.float32, ALIGNED)
    g_at = _pointer(table_ptr, 3 * count, first, GRADIENT, ALIGNED)
    m_at = _pointer(table_ptr, 4 * count, first, tl.float32, ALIGNED)
    v_at = _pointer(table_ptr, 5 * count, first, tl.float32, ALIGNED)
    t_at = _pointer(table_ptr, 6 * count, first, tl.float32, ALIGNED)
    copy_at = _pointer(table_ptr, 7 * count, first, COPY, ALIGNED)
    t_copy_at = _pointer(table_ptr, 8 * count, first, COPY, ALIGNED)
    moved = tl.where(rate == rate, left, 0)  # how many values of each kind, from the chunk's first one on
    following = tl.where(t_at == 0, 0, left)
    copied, followers_copied = tl.where(copy_at == 0, 0, left), tl.where(t_copy_at == 0, 0, following)
    for start in range(0, _CHUNK, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        p_ptr = p_at.to(tl.pointer_type(tl.float32)) + offs
        m_ptr = m_at.to(tl.pointer_type(tl.float32)) + offs
        v_ptr = v_at.to(tl.pointer_type(tl.float32)) + offs
        t_ptr = t_at.to(tl.pointer_type(tl.float32)) + offs
        moves, follows = offs < moved, offs < following
        p = tl.load(p_ptr, mask=offs < left, other=0)
        g = tl.load(g_at.to(tl.pointer_type(GRADIENT)) + offs, mask=moves, other=0).to(tl.float32) * scale
        m = tl.load(m_ptr, mask=moves, other=0)
        v = tl.load(v_ptr, mask=moves, other=0)
        t = tl.load(t_ptr, mask=follows, other=0)
        m += (g - m) * beta1_rest
        v = v * beta2 + g * g * beta2_rest
        p = tl.where(moves, p * decay - rate * (m / (tl.sqrt(v) * root + eps)), p)
        t = tl.where(share < 0.5, t + share * (p - t), p - (p - t) * (1 - share))
        tl.store(p_ptr, p, mask=moves)
        tl.store(m_ptr, m, mask=moves)
        tl.store(v_ptr, v, mask=moves)
        tl.store(t_ptr, t, mask=follows)
        store(copy_at.to(tl.pointer_type(COPY)) + offs, p, offs < copied)
        store(t_copy_at.to(tl.pointer_type(COPY)) + offs, t, offs < followers_copied)


def adamw_fwd(*args) -> None:
    """Raw arguments as `patchlight::adamw_fwd`."""
    steps, scale, lr, weight_decay, momentum, freeze, refused = args[7:14]
    decayed, frozen, beta1, beta2, eps = args[14:]
    ready = prepared(args[:7], decayed, frozen)
    count, blocks = len(steps), ready.blocks.shape[1]
    numbers = torch.empty(5, count, device=steps.device)
    logs = tuple(math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    _numbers_kernel[(triton.cdiv(count, 128),)](
        *(ready.table, steps, scale, lr, weight_decay, momentum, freeze, refused, numbers, count, *logs),
        BLOCK=128,
        num_warps=4,
    )
    _sweep_kernel[(blocks,)](
        *(ready.table, ready.blocks, numbers, refused, count, blocks, 1 - beta1, beta2, 1 - beta2, eps),
        GRADIENT=TYPES[ready.gradient],
        COPY=TYPES[ready.copy],
        ALIGNED=ready.aligned,
        BLOCK=1024,
        num_warps=4,
    )
