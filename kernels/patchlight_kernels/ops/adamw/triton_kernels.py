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
    """Where a chunk begins in the tensor of that row."""
    address = tl.load(table_ptr + row) + first * (TYPE.primitive_bitwidth // 8)
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(ptr, offs, left, FULL: tl.constexpr):
    """fp32 values of a chunk; a chunk that is FULL needs no mask, and is read four values at a time."""
    x = tl.load(ptr + offs) if FULL else tl.load(ptr + offs, mask=offs < left, other=0)
    return x.to(tl.float32)


@triton.jit
def _write(ptr, offs, left, x, FULL: tl.constexpr):
    if FULL:
        store(ptr + offs, x, None)
    else:
        store(ptr + offs, x, offs < left)


@triton.jit
def _sweep(
    table_ptr,
    numbers_ptr,
    count,
    first,
    left,
    beta1_rest,
    beta2,
    beta2_rest,
    eps,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """One chunk; what has no address or does not move is not read."""
    scale, decay = tl.load(numbers_ptr), tl.load(numbers_ptr + count)
    rate, root = tl.load(numbers_ptr + 2 * count), tl.load(numbers_ptr + 3 * count)
    share = tl.load(numbers_ptr + 4 * count)
    p_ptr = _pointer(table_ptr, 2 * count, first, tl.float32, ALIGNED)
    g_ptr = _pointer(table_ptr, 3 * count, first, GRADIENT, ALIGNED)
    m_ptr = _pointer(table_ptr, 4 * count, first, tl.float32, ALIGNED)
    v_ptr = _pointer(table_ptr, 5 * count, first, tl.float32, ALIGNED)
    t_ptr = _pointer(table_ptr, 6 * count, first, tl.float32, ALIGNED)
    copy_ptr = _pointer(table_ptr, 7 * count, first, COPY, ALIGNED)
    t_copy_ptr = _pointer(table_ptr, 8 * count, first, COPY, ALIGNED)
    follows, copied = tl.load(table_ptr + 6 * count) != 0, tl.load(table_ptr + 7 * count) != 0
    t_copied = tl.load(table_ptr + 8 * count) != 0
    for start in range(0, _CHUNK, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        p = _read(p_ptr, offs, left, FULL)
        t = p
        if follows:
            t = _read(t_ptr, offs, left, FULL)
        if rate == rate:
            g = _read(g_ptr, offs, left, FULL) * scale
            m, v = _read(m_ptr, offs, left, FULL), _read(v_ptr, offs, left, FULL)
            m += (g - m) * beta1_rest
            v = v * beta2 + g * g * beta2_rest
            p = p * decay - rate * (m / (tl.sqrt(v) * root + eps))
            _write(p_ptr, offs, left, p, FULL)
            _write(m_ptr, offs, left, m, FULL)
            _write(v_ptr, offs, left, v, FULL)
        if copied:
            _write(copy_ptr, offs, left, p, FULL)
        if follows:
            t = tl.where(share < 0.5, t + share * (p - t), p - (p - t) * (1 - share))
            _write(t_ptr, offs, left, t, FULL)
            if t_copied:
                _write(t_copy_ptr, offs, left, t, FULL)


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
    if left >= _CHUNK:
        _sweep(
            *(table_ptr, numbers_ptr, count, first, left, beta1_rest, beta2, beta2_rest, eps),
            *(GRADIENT, COPY, ALIGNED, BLOCK, True),
        )
    else:
        _sweep(
            *(table_ptr, numbers_ptr, count, first, left, beta1_rest, beta2, beta2_rest, eps),
            *(GRADIENT, COPY, ALIGNED, BLOCK, False),
        )


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
