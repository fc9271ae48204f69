"""Triton kernels of class_attention. Two ways to read patches, few by index or all in a stream, and for the backward two
directions: states gather from patches, then patches gather from the states that read them.

The second direction needs what the first one found: each weight, and the gradient by that weight. They pass through
memory as fp32 [M, Q, H, K], a tenth of the traffic of the rows, and spare every product a second time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import hardware
from ...tuning import autotune
from .reference import accumulator, scale_of, state_shape

_INTERPRETED = tl.constexpr(hardware.triton_interpreted())
KEY = ["HEADS", "WIDTH"]

# A block of states, and the neighbors whose loads are in flight together.
INDEX_CONFIGS = [
    triton.Config({"BLOCK_Q": 32, "TOGETHER": 4}, num_warps=4),
    triton.Config({"BLOCK_Q": 16, "TOGETHER": 4}, num_warps=2),
    triton.Config({"BLOCK_Q": 64, "TOGETHER": 4}, num_warps=8),
    triton.Config({"BLOCK_Q": 16, "TOGETHER": 4}, num_warps=4),
]
# A block of patches of one state that reads them all.
ALL_CONFIGS = [
    triton.Config({"BLOCK_N": 64}, num_warps=4),
    triton.Config({"BLOCK_N": 32}, num_warps=4),
    triton.Config({"BLOCK_N": 128}, num_warps=8),
]
# A block of patches that gather from states.
PATCH_CONFIGS = [
    triton.Config({"BLOCK_N": 32}, num_warps=4),
    triton.Config({"BLOCK_N": 16}, num_warps=2),
    triton.Config({"BLOCK_N": 16}, num_warps=4),
]


@triton.jit
def _load_rows(x_ptr, offsets, offs_e, mask):
    """Rows [BLOCK, BLOCK_E] in fp32, zeros where masked."""
    return tl.load(x_ptr + offsets[:, None] + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, x, mask):
    """Stores fp32 values in the tensor's dtype. The interpreter would cut bf16 off, so there it is rounded by hand."""
    if _INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@autotune(INDEX_CONFIGS, key=[*KEY, "K"])
@triton.jit
def _index_fwd_kernel(
    q_ptr,  # [M or 1, Q or 1, HEADS, WIDTH]; a stride is 0 where a size of 1 stands for all
    k_self_ptr,
    v_self_ptr,
    k_ptr,  # [M, N, HEADS, WIDTH]
    v_ptr,
    index_ptr,  # [M, Q, K] int32
    out_ptr,  # [M, Q, HEADS, WIDTH]
    lse_ptr,  # [M, Q, HEADS] fp32
    q_stride_m, q_stride_q, q_stride_h,
    k_self_stride_m, k_self_stride_q, k_self_stride_h,
    v_self_stride_m, v_self_stride_q, v_self_stride_h,
    k_stride_m, k_stride_n, k_stride_h,
    v_stride_m, v_stride_n, v_stride_h,
    states,
    patches,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q states of one head: the softmax runs along the neighbors, keys and values of each loaded once."""
    blocks = tl.cdiv(states, BLOCK_Q)
    head = (tl.program_id(0) // blocks) % HEADS
    image = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    offs_q = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < states
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    mask = mask_q[:, None] & mask_e[None, :]
    offs_q = offs_q.to(tl.int64)
    q_ptr += image * q_stride_m + head * q_stride_h
    k_self_ptr += image * k_self_stride_m + head * k_self_stride_h
    v_self_ptr += image * v_self_stride_m + head * v_self_stride_h
    k_ptr += image * k_stride_m + head * k_stride_h
    v_ptr += image * v_stride_m + head * v_stride_h
    index_ptr += (image * states + offs_q) * K

    q = _load_rows(q_ptr, offs_q * q_stride_q, offs_e, mask)
    k = _load_rows(k_self_ptr, offs_q * k_self_stride_q, offs_e, mask)
    acc = _load_rows(v_self_ptr, offs_q * v_self_stride_q, offs_e, mask)

    top = tl.sum(q * k, axis=1) * scale  # the own key counts 1 from the start
    total = tl.full((BLOCK_Q,), 1.0, tl.float32)
    for s in tl.range(0, K, loop_unroll_factor=TOGETHER):
        patch = tl.load(index_ptr + s, mask=mask_q, other=-1).to(tl.int64)
        there = (patch >= 0) & (patch < patches)
        mask_k = there[:, None] & mask_e[None, :]
        k = _load_rows(k_ptr, patch * k_stride_n, offs_e, mask_k)
        v = _load_rows(v_ptr, patch * v_stride_n, offs_e, mask_k)
        score = tl.where(there, tl.sum(q * k, axis=1) * scale, -float("inf"))
        new_top = tl.maximum(top, score)
        shrink = tl.exp(top - new_top)
        weight = tl.exp(score - new_top)
        acc = acc * shrink[:, None] + weight[:, None] * v
        total = total * shrink + weight
        top = new_top

    row = (image * states + offs_q) * HEADS + head
    out = acc / total[:, None]
    _store(out_ptr + row[:, None] * WIDTH + offs_e[None, :], out, mask)
    tl.store(lse_ptr + row, top + tl.log(total), mask=mask_q)


@autotune(ALL_CONFIGS, key=[*KEY, "PATCHES"])
@triton.jit
def _all_fwd_kernel(
    q_ptr,  # [M or 1, Q or 1, HEADS, WIDTH]; a stride is 0 where a size of 1 stands for all
    k_self_ptr,
    v_self_ptr,
    k_ptr,  # [M, PATCHES, HEADS, WIDTH]
    v_ptr,
    out_ptr,  # [M, Q, HEADS, WIDTH]
    lse_ptr,  # [M, Q, HEADS] fp32
    q_stride_m, q_stride_q, q_stride_h,
    k_self_stride_m, k_self_stride_q, k_self_stride_h,
    v_self_stride_m, v_self_stride_q, v_self_stride_h,
    k_stride_m, k_stride_n, k_stride_h,
    v_stride_m, v_stride_n, v_stride_h,
    states,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One state of one head against all patches, BLOCK_N at a time."""
    head = tl.program_id(0) % HEADS
    state = ((tl.program_id(0) // HEADS) % states).to(tl.int64)
    image = (tl.program_id(0) // (HEADS * states)).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    q_ptr += image * q_stride_m + state * q_stride_q + head * q_stride_h
    k_self_ptr += image * k_self_stride_m + state * k_self_stride_q + head * k_self_stride_h
    v_self_ptr += image * v_self_stride_m + state * v_self_stride_q + head * v_self_stride_h
    k_ptr += image * k_stride_m + head * k_stride_h
    v_ptr += image * v_stride_m + head * v_stride_h

    q = tl.load(q_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    k_self = tl.load(k_self_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    acc = tl.load(v_self_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    top = tl.sum(q * k_self, axis=0) * scale
    total = 1.0
    for first in range(0, PATCHES, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < PATCHES
        mask = mask_n[:, None] & mask_e[None, :]
        k = _load_rows(k_ptr, offs_n.to(tl.int64) * k_stride_n, offs_e, mask)
        v = _load_rows(v_ptr, offs_n.to(tl.int64) * v_stride_n, offs_e, mask)
        score = tl.where(mask_n, tl.sum(q[None, :] * k, axis=1) * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        shrink = tl.exp(top - new_top)
        weight = tl.exp(score - new_top)
        acc = acc * shrink + tl.sum(weight[:, None] * v, axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        top = new_top

    row = (image * states + state) * HEADS + head
    _store(out_ptr + row * WIDTH + offs_e, acc / total, mask_e)
    tl.store(lse_ptr + row, top + tl.log(total))


@autotune(INDEX_CONFIGS, key=[*KEY, "K"])
@triton.jit
def _index_states_bwd_kernel(
    grad_ptr,  # [M, Q, HEADS, WIDTH]
    q_ptr,  # [M or 1, Q or 1, HEADS, WIDTH]
    k_self_ptr,
    v_self_ptr,
    k_ptr,  # [M, N, HEADS, WIDTH]
    v_ptr,
    index_ptr,  # [M, Q, K] int32
    lse_ptr,  # [M, Q, HEADS] fp32
    dq_ptr,  # [M, Q, HEADS, WIDTH]
    dk_self_ptr,
    dv_self_ptr,
    weight_ptr,  # [M, Q, HEADS, K] fp32
    d_weight_ptr,
    mean_ptr,  # [M, Q, HEADS] fp32, the mean of d_weight
    grad_stride_m, grad_stride_q, grad_stride_h,
    q_stride_m, q_stride_q, q_stride_h,
    k_self_stride_m, k_self_stride_q, k_self_stride_h,
    v_self_stride_m, v_self_stride_q, v_self_stride_h,
    k_stride_m, k_stride_n, k_stride_h,
    v_stride_m, v_stride_n, v_stride_h,
    states,
    patches,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q states of one head. dq = sum w (dw - mean) k is kept as two sums, as the mean is known at the end only."""
    blocks = tl.cdiv(states, BLOCK_Q)
    head = (tl.program_id(0) // blocks) % HEADS
    image = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    offs_q = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < states
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    mask = mask_q[:, None] & mask_e[None, :]
    offs_q = offs_q.to(tl.int64)
    row = (image * states + offs_q) * HEADS + head
    grad_ptr += image * grad_stride_m + head * grad_stride_h
    q_ptr += image * q_stride_m + head * q_stride_h
    k_self_ptr += image * k_self_stride_m + head * k_self_stride_h
    v_self_ptr += image * v_self_stride_m + head * v_self_stride_h
    k_ptr += image * k_stride_m + head * k_stride_h
    v_ptr += image * v_stride_m + head * v_stride_h
    index_ptr += (image * states + offs_q) * K

    grad = _load_rows(grad_ptr, offs_q * grad_stride_q, offs_e, mask)
    q = _load_rows(q_ptr, offs_q * q_stride_q, offs_e, mask)
    k = _load_rows(k_self_ptr, offs_q * k_self_stride_q, offs_e, mask)
    v = _load_rows(v_self_ptr, offs_q * v_self_stride_q, offs_e, mask)
    lse = tl.load(lse_ptr + row, mask=mask_q, other=0.0)

    own_weight = tl.exp(tl.sum(q * k, axis=1) * scale - lse)
    own_d_weight = tl.sum(grad * v, axis=1)
    mean = own_weight * own_d_weight
    weighted_k = own_weight[:, None] * k
    d_weighted_k = mean[:, None] * k
    for s in tl.range(0, K, loop_unroll_factor=TOGETHER):
        patch = tl.load(index_ptr + s, mask=mask_q, other=-1).to(tl.int64)
        there = (patch >= 0) & (patch < patches)
        mask_k = there[:, None] & mask_e[None, :]
        k = _load_rows(k_ptr, patch * k_stride_n, offs_e, mask_k)
        v = _load_rows(v_ptr, patch * v_stride_n, offs_e, mask_k)
        weight = tl.where(there, tl.exp(tl.sum(q * k, axis=1) * scale - lse), 0.0)
        d_weight = tl.sum(grad * v, axis=1)
        product = weight * d_weight
        mean += product
        weighted_k += weight[:, None] * k
        d_weighted_k += product[:, None] * k
        tl.store(weight_ptr + row * K + s, weight, mask=mask_q)
        tl.store(d_weight_ptr + row * K + s, d_weight, mask=mask_q)

    dq = (d_weighted_k - mean[:, None] * weighted_k) * scale
    dk_self = (own_weight * (own_d_weight - mean) * scale)[:, None] * q
    dv_self = own_weight[:, None] * grad
    at = row[:, None] * WIDTH + offs_e[None, :]
    _store(dq_ptr + at, dq, mask)
    _store(dk_self_ptr + at, dk_self, mask)
    _store(dv_self_ptr + at, dv_self, mask)
    tl.store(mean_ptr + row, mean, mask=mask_q)


@autotune(ALL_CONFIGS, key=[*KEY, "PATCHES"])
@triton.jit
def _all_states_bwd_kernel(
    grad_ptr,  # [M, Q, HEADS, WIDTH]
    q_ptr,  # [M or 1, Q or 1, HEADS, WIDTH]
    k_self_ptr,
    v_self_ptr,
    k_ptr,  # [M, PATCHES, HEADS, WIDTH]
    v_ptr,
    lse_ptr,  # [M, Q, HEADS] fp32
    dq_ptr,  # [M, Q, HEADS, WIDTH]
    dk_self_ptr,
    dv_self_ptr,
    weight_ptr,  # [M, Q, HEADS, PATCHES] fp32
    d_weight_ptr,
    mean_ptr,  # [M, Q, HEADS] fp32
    grad_stride_m, grad_stride_q, grad_stride_h,
    q_stride_m, q_stride_q, q_stride_h,
    k_self_stride_m, k_self_stride_q, k_self_stride_h,
    v_self_stride_m, v_self_stride_q, v_self_stride_h,
    k_stride_m, k_stride_n, k_stride_h,
    v_stride_m, v_stride_n, v_stride_h,
    states,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One state of one head, as above with all patches for neighbors."""
    head = tl.program_id(0) % HEADS
    state = ((tl.program_id(0) // HEADS) % states).to(tl.int64)
    image = (tl.program_id(0) // (HEADS * states)).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    row = (image * states + state) * HEADS + head
    grad_ptr += image * grad_stride_m + state * grad_stride_q + head * grad_stride_h
    q_ptr += image * q_stride_m + state * q_stride_q + head * q_stride_h
    k_self_ptr += image * k_self_stride_m + state * k_self_stride_q + head * k_self_stride_h
    v_self_ptr += image * v_self_stride_m + state * v_self_stride_q + head * v_self_stride_h
    k_ptr += image * k_stride_m + head * k_stride_h
    v_ptr += image * v_stride_m + head * v_stride_h

    grad = tl.load(grad_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    q = tl.load(q_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    k_self = tl.load(k_self_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    v_self = tl.load(v_self_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + row)
    own_weight = tl.exp(tl.sum(q * k_self, axis=0) * scale - lse)
    own_d_weight = tl.sum(grad * v_self, axis=0)
    mean = own_weight * own_d_weight
    weighted_k = own_weight * k_self
    d_weighted_k = mean * k_self
    for first in range(0, PATCHES, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < PATCHES
        mask = mask_n[:, None] & mask_e[None, :]
        k = _load_rows(k_ptr, offs_n.to(tl.int64) * k_stride_n, offs_e, mask)
        v = _load_rows(v_ptr, offs_n.to(tl.int64) * v_stride_n, offs_e, mask)
        weight = tl.where(mask_n, tl.exp(tl.sum(q[None, :] * k, axis=1) * scale - lse), 0.0)
        d_weight = tl.sum(grad[None, :] * v, axis=1)
        product = weight * d_weight
        mean += tl.sum(product, axis=0)
        weighted_k += tl.sum(weight[:, None] * k, axis=0)
        d_weighted_k += tl.sum(product[:, None] * k, axis=0)
        tl.store(weight_ptr + row * PATCHES + offs_n, weight, mask=mask_n)
        tl.store(d_weight_ptr + row * PATCHES + offs_n, d_weight, mask=mask_n)

    dq = (d_weighted_k - mean * weighted_k) * scale
    dk_self = own_weight * (own_d_weight - mean) * scale * q
    dv_self = own_weight * grad
    at = row * WIDTH + offs_e
    _store(dq_ptr + at, dq, mask_e)
    _store(dk_self_ptr + at, dk_self, mask_e)
    _store(dv_self_ptr + at, dv_self, mask_e)
    tl.store(mean_ptr + row, mean)


@autotune(PATCH_CONFIGS, key=[*KEY, "K", "HAS_INDEX"])
@triton.jit
def _patches_bwd_kernel(
    grad_ptr,  # [M, Q, HEADS, WIDTH]
    q_ptr,  # [M or 1, Q or 1, HEADS, WIDTH]
    weight_ptr,  # [M, Q, HEADS, K] fp32
    d_weight_ptr,
    mean_ptr,  # [M, Q, HEADS] fp32
    slot_ptr,  # [M, Q * K] int64: the slots of an image ordered by the patch they hold, if HAS_INDEX
    begin_ptr,  # [M, N + 1] int32: where each patch's slots begin, if HAS_INDEX
    dk_ptr,  # [M, N, HEADS, WIDTH]
    dv_ptr,
    grad_stride_m, grad_stride_q, grad_stride_h,
    q_stride_m, q_stride_q, q_stride_h,
    states,
    patches,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,  # N without an index
    HAS_INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N patches of one head gather from the states that read them, in the order of the states."""
    blocks = tl.cdiv(patches, BLOCK_N)
    head = (tl.program_id(0) // blocks) % HEADS
    image = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < patches
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    grad_ptr += image * grad_stride_m + head * grad_stride_h
    q_ptr += image * q_stride_m + head * q_stride_h
    first_row = image * states * HEADS + head

    if HAS_INDEX:
        begin = tl.load(begin_ptr + image * (patches + 1) + offs_n, mask=mask_n, other=0)
        readers = tl.load(begin_ptr + image * (patches + 1) + offs_n + 1, mask=mask_n, other=0) - begin
        slot_ptr += image * states * K + begin
        rounds = tl.max(readers, axis=0)
    else:
        rounds = states

    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    r = 0
    while r < rounds:
        if HAS_INDEX:
            reads = r < readers
            slot = tl.load(slot_ptr + r, mask=reads, other=0).to(tl.int32)
            state = (slot // K).to(tl.int64)
            column = slot % K
        else:
            reads = mask_n
            state = tl.zeros((BLOCK_N,), tl.int64) + r
            column = offs_n
        row = first_row + state * HEADS
        mask = reads[:, None] & mask_e[None, :]
        weight = tl.load(weight_ptr + row * K + column, mask=reads, other=0.0)
        d_weight = tl.load(d_weight_ptr + row * K + column, mask=reads, other=0.0)
        mean = tl.load(mean_ptr + row, mask=reads, other=0.0)
        q = _load_rows(q_ptr, state * q_stride_q, offs_e, mask)
        grad = _load_rows(grad_ptr, state * grad_stride_q, offs_e, mask)
        dk += (weight * (d_weight - mean) * scale)[:, None] * q
        dv += weight[:, None] * grad
        r += 1

    at = ((image * patches + offs_n) * HEADS + head)[:, None] * WIDTH + offs_e[None, :]
    mask = mask_n[:, None] & mask_e[None, :]
    _store(dk_ptr + at, dk, mask)
    _store(dv_ptr + at, dv, mask)


def _strides(*tensors: Tensor) -> list[int]:
    """Outer strides of [rows, rows, heads, width] tensors, 0 where a size of 1 stands for all."""
    return [0 if x.shape[dim] == 1 else x.stride(dim) for x in tensors for dim in (0, 1, 2)]


def _constants(shape: tuple[int, ...]) -> dict[str, int]:
    return {"HEADS": shape[2], "WIDTH": shape[3], "BLOCK_E": max(2, triton.next_power_of_2(shape[3]))}


def class_attention_fwd(
    q: Tensor, k_self: Tensor, v_self: Tensor, k_patches: Tensor, v_patches: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Raw arguments as `patchlight::class_attention_fwd`."""
    shape = images, states, heads, width = state_shape(q, k_self, v_self, k_patches, index)
    patches = k_patches.shape[1]
    out = q.new_empty(shape)
    lse = q.new_empty(shape[:-1], dtype=accumulator(q.dtype))
    read = (q, k_self, v_self, k_patches, v_patches)
    strides, scale = _strides(*read), scale_of(width)
    if index is None:
        _all_fwd_kernel[(images * states * heads,)](
            *read, out, lse, *strides, states, scale, **_constants(shape), PATCHES=patches
        )
        return out, lse

    def grid(meta):
        return (images * heads * triton.cdiv(states, meta["BLOCK_Q"]),)

    _index_fwd_kernel[grid](
        *read, index, out, lse, *strides, states, patches, scale, **_constants(shape), K=index.shape[2]
    )
    return out, lse


def class_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_patches: Tensor,
    v_patches: Tensor,
    index: Tensor | None,
    lse: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the five tensors; those of q, k_self, v_self for every state, in fp32 where they are still to be summed."""
    shape = images, states, heads, width = state_shape(q, k_self, v_self, k_patches, index)
    patches = k_patches.shape[1]
    own = [x.new_empty(shape, dtype=x.dtype if x.shape == shape else accumulator(x.dtype)) for x in (q, k_self, v_self)]
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k_patches, v_patches))
    slots = patches if index is None else index.shape[2]
    weight, d_weight = (lse.new_empty(*shape[:-1], slots) for _ in range(2))
    mean = torch.empty_like(lse)
    read = (grad, q, k_self, v_self, k_patches, v_patches)
    written = (*own, weight, d_weight, mean)
    strides, scale, constants = _strides(*read), scale_of(width), _constants(shape)

    if index is None:
        by_patch = begin = mean  # not looked at
        _all_states_bwd_kernel[(images * states * heads,)](
            *read, lse, *written, *strides, states, scale, **constants, PATCHES=patches
        )
    else:
        by_patch, begin = _inverse(index, patches)

        def grid_of_states(meta):
            return (images * heads * triton.cdiv(states, meta["BLOCK_Q"]),)

        _index_states_bwd_kernel[grid_of_states](
            *read, index, lse, *written, *strides, states, patches, scale, **constants, K=slots
        )  # fmt: skip

    def grid_of_patches(meta):
        return (images * heads * triton.cdiv(patches, meta["BLOCK_N"]),)

    gathered = (grad, q, weight, d_weight, mean, by_patch, begin, dk, dv)
    _patches_bwd_kernel[grid_of_patches](
        *gathered, *_strides(grad, q), states, patches, scale, **constants, K=slots, HAS_INDEX=index is not None
    )
    return (*own, dk, dv)


def _inverse(index: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Which slots hold each patch: the slots [M, Q * K] in order of their patch (then of themselves), where each begins.

    A stable sort and a search: about six small kernels, nothing waits for the host.
    """
    ordered, slot = index.flatten(1).sort(dim=1, stable=True)
    patch = torch.arange(patches + 1, dtype=index.dtype, device=index.device)
    return slot, torch.searchsorted(ordered, patch.expand(len(index), -1).contiguous(), out_int32=True)
