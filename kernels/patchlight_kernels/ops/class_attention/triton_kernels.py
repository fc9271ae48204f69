"""Triton kernels of class_attention. States read a few patches by index, or all of them; the backward runs in two steps:
first each state gathers from the patches that it reads, then each patch gathers from the states that read it.

The second step needs each weight of the first one, and the gradient by that weight. They pass through memory as fp32
[M, Q, H, K], a tenth of the traffic of the rows, so that no product is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_functions import append, at_most_zero, store
from ...tuning import autotune
from .reference import accumulator, scale_of, state_shape

KEY = ["HEADS", "WIDTH"]

# A block of states, and the neighbors that are loaded at the same time.
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
def _block(count, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's image and head, and the numbers of its BLOCK out of `count` states or patches."""
    blocks = tl.cdiv(count, BLOCK)
    head = ((tl.program_id(0) // blocks) % HEADS).to(tl.int64)
    image = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    return image, head, (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _state(states, HEADS: tl.constexpr):
    """The program's image, head and state."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    state = ((tl.program_id(0) // HEADS) % states).to(tl.int64)
    return (tl.program_id(0) // (HEADS * states)).to(tl.int64), head, state


@triton.jit
def _starts(pointers, strides, image, head, state):
    """Where the rows of one head begin, from `state` on, in each tensor. A stride is 0 where a size of 1 stands for all."""
    starts = ()
    for i in tl.static_range(len(pointers)):
        offset = image * strides[i][0] + state * strides[i][1] + head * strides[i][2]
        starts = append(starts, pointers[i] + offset)
    return starts


@triton.jit
def _load_row(ptr, offs_e, mask_e):
    """One row in fp32, zeros where masked."""
    return tl.load(ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)


@triton.jit
def _load_rows(ptr, offsets, offs_e, mask):
    """Rows [BLOCK, BLOCK_E] in fp32, zeros where masked."""
    return tl.load(ptr + offsets[:, None] + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_patches(k_ptr, v_ptr, k_strides, v_strides, patch, exists, offs_e, mask_e):
    """Keys and values of some patches, zeros for those that do not exist."""
    mask = exists[:, None] & mask_e[None, :]
    k = _load_rows(k_ptr, patch.to(tl.int64) * k_strides[1], offs_e, mask)
    return k, _load_rows(v_ptr, patch.to(tl.int64) * v_strides[1], offs_e, mask)


@autotune(INDEX_CONFIGS, key=[*KEY, "K"])
@triton.jit
def _index_fwd_kernel(
    read,  # q, k_self, v_self: [M or 1, Q or 1, HEADS, WIDTH]; k, v: [M, N, HEADS, WIDTH]
    index_ptr,  # [M, Q, K] int32
    out_ptr,  # out: [M, Q, HEADS, WIDTH]
    lse_ptr,  # out: [M, Q, HEADS] fp32
    strides,  # of image, state or patch, and head, for each tensor of `read`
    states,
    patches,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """BLOCK_Q states of one head: the softmax runs along the neighbors, keys and values of each loaded once."""
    q_strides, k_self_strides, v_self_strides, k_strides, v_strides = strides
    image, head, offs_q = _block(states, HEADS, BLOCK_Q)
    mask_q, offs_e = offs_q < states, tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    mask = mask_q[:, None] & mask_e[None, :]
    offs_q = offs_q.to(tl.int64)
    q_ptr, k_self_ptr, v_self_ptr, k_ptr, v_ptr = _starts(read, strides, image, head, 0)
    index_ptr += (image * states + offs_q) * K

    q = _load_rows(q_ptr, offs_q * q_strides[1], offs_e, mask)
    k = _load_rows(k_self_ptr, offs_q * k_self_strides[1], offs_e, mask)
    acc = _load_rows(v_self_ptr, offs_q * v_self_strides[1], offs_e, mask)
    top = tl.sum(q * k, axis=1) * scale  # a state's own key has weight 1 at the start
    total = tl.full((BLOCK_Q,), 1.0, tl.float32)
    for s in tl.range(0, K, loop_unroll_factor=TOGETHER):
        patch = tl.load(index_ptr + s, mask=mask_q, other=-1).to(tl.int64)
        exists = (patch >= 0) & (patch < patches)
        k, v = _load_patches(k_ptr, v_ptr, k_strides, v_strides, patch, exists, offs_e, mask_e)
        score = tl.where(exists, tl.sum(q * k, axis=1) * scale, -float("inf"))
        new_top = tl.maximum(top, score)
        shrink = tl.exp(top - new_top)
        weight = tl.exp(score - new_top)
        acc = acc * shrink[:, None] + weight[:, None] * v
        total = total * shrink + weight
        top = new_top

    row = (image * states + offs_q) * HEADS + head
    out = acc / total[:, None]
    store(out_ptr + row[:, None] * WIDTH + offs_e[None, :], out, mask)
    tl.store(lse_ptr + row, top + tl.log(total), mask=mask_q)


@autotune(ALL_CONFIGS, key=[*KEY, "PATCHES"])
@triton.jit
def _all_fwd_kernel(
    read,  # as above, N = PATCHES
    out_ptr,
    lse_ptr,
    strides,
    states,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One state of one head against all patches, BLOCK_N at a time."""
    k_strides, v_strides = strides[3:]
    image, head, state = _state(states, HEADS)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    q_ptr, k_self_ptr, v_self_ptr = _starts(read[:3], strides[:3], image, head, state)
    k_ptr, v_ptr = _starts(read[3:], strides[3:], image, head, 0)

    q = _load_row(q_ptr, offs_e, mask_e)
    k_self = _load_row(k_self_ptr, offs_e, mask_e)
    acc = _load_row(v_self_ptr, offs_e, mask_e)
    top = tl.sum(q * k_self, axis=0) * scale
    total = 1.0
    for first in range(0, PATCHES, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < PATCHES
        k, v = _load_patches(k_ptr, v_ptr, k_strides, v_strides, offs_n, mask_n, offs_e, mask_e)
        score = tl.where(mask_n, tl.sum(q[None, :] * k, axis=1) * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        shrink = tl.exp(top - new_top)
        weight = tl.exp(score - new_top)
        acc = acc * shrink + tl.sum(weight[:, None] * v, axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        top = new_top

    row = (image * states + state) * HEADS + head
    store(out_ptr + row * WIDTH + offs_e, acc / total, mask_e)
    tl.store(lse_ptr + row, top + tl.log(total))


@autotune(INDEX_CONFIGS, key=[*KEY, "K"])
@triton.jit
def _index_states_bwd_kernel(
    read,  # grad: [M, Q, HEADS, WIDTH]; q, k_self, v_self: [M or 1, Q or 1, HEADS, WIDTH]; k, v: [M, N, HEADS, WIDTH]
    index_ptr,  # [M, Q, K] int32
    lse_ptr,  # [M, Q, HEADS] fp32
    dq_ptr,  # out: [M, Q, HEADS, WIDTH]
    dk_self_ptr,
    dv_self_ptr,
    weight_ptr,  # out: [M, Q, HEADS, K] fp32
    d_weight_ptr,
    mean_ptr,  # out: [M, Q, HEADS] fp32, the mean of d_weight
    strides,  # of image, state or patch, and head, for each tensor of `read`
    states,
    patches,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """BLOCK_Q states of one head. dq = sum w (dw - mean) k is kept as two sums, as the mean is known at the end only."""
    grad_strides, q_strides, k_self_strides, v_self_strides, k_strides, v_strides = strides
    image, head, offs_q = _block(states, HEADS, BLOCK_Q)
    mask_q, offs_e = offs_q < states, tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    mask = mask_q[:, None] & mask_e[None, :]
    offs_q = offs_q.to(tl.int64)
    row = (image * states + offs_q) * HEADS + head
    grad_ptr, q_ptr, k_self_ptr, v_self_ptr, k_ptr, v_ptr = _starts(read, strides, image, head, 0)
    index_ptr += (image * states + offs_q) * K
    grad = _load_rows(grad_ptr, offs_q * grad_strides[1], offs_e, mask)
    q = _load_rows(q_ptr, offs_q * q_strides[1], offs_e, mask)
    k = _load_rows(k_self_ptr, offs_q * k_self_strides[1], offs_e, mask)
    v = _load_rows(v_self_ptr, offs_q * v_self_strides[1], offs_e, mask)
    lse = tl.load(lse_ptr + row, mask=mask_q, other=0.0)
    own_weight = tl.exp(at_most_zero(tl.sum(q * k, axis=1) * scale - lse))
    own_d_weight = tl.sum(grad * v, axis=1)
    mean = own_weight * own_d_weight
    weighted_k, d_weighted_k = own_weight[:, None] * k, mean[:, None] * k
    for s in tl.range(0, K, loop_unroll_factor=TOGETHER):
        patch = tl.load(index_ptr + s, mask=mask_q, other=-1).to(tl.int64)
        exists = (patch >= 0) & (patch < patches)
        k, v = _load_patches(k_ptr, v_ptr, k_strides, v_strides, patch, exists, offs_e, mask_e)
        weight = tl.where(exists, tl.exp(at_most_zero(tl.sum(q * k, axis=1) * scale - lse)), 0.0)
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
    store(dq_ptr + at, dq, mask)
    store(dk_self_ptr + at, dk_self, mask)
    store(dv_self_ptr + at, dv_self, mask)
    tl.store(mean_ptr + row, mean, mask=mask_q)


@autotune(ALL_CONFIGS, key=[*KEY, "PATCHES"])
@triton.jit
def _all_states_bwd_kernel(
    read,  # as above, N = K = PATCHES
    lse_ptr,
    dq_ptr,
    dk_self_ptr,
    dv_self_ptr,
    weight_ptr,
    d_weight_ptr,
    mean_ptr,
    strides,
    states,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One state of one head, as above with all patches for neighbors."""
    k_strides, v_strides = strides[4:]
    image, head, state = _state(states, HEADS)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    row = (image * states + state) * HEADS + head
    grad_ptr, q_ptr, k_self_ptr, v_self_ptr = _starts(read[:4], strides[:4], image, head, state)
    k_ptr, v_ptr = _starts(read[4:], strides[4:], image, head, 0)

    grad = _load_row(grad_ptr, offs_e, mask_e)
    q = _load_row(q_ptr, offs_e, mask_e)
    k_self = _load_row(k_self_ptr, offs_e, mask_e)
    v_self = _load_row(v_self_ptr, offs_e, mask_e)
    lse = tl.load(lse_ptr + row)
    own_weight = tl.exp(at_most_zero(tl.sum(q * k_self, axis=0) * scale - lse))
    own_d_weight = tl.sum(grad * v_self, axis=0)
    mean = own_weight * own_d_weight
    weighted_k = own_weight * k_self
    d_weighted_k = mean * k_self
    for first in range(0, PATCHES, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < PATCHES
        k, v = _load_patches(k_ptr, v_ptr, k_strides, v_strides, offs_n, mask_n, offs_e, mask_e)
        weight = tl.where(mask_n, tl.exp(at_most_zero(tl.sum(q[None, :] * k, axis=1) * scale - lse)), 0.0)
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
    store(dq_ptr + at, dq, mask_e)
    store(dk_self_ptr + at, dk_self, mask_e)
    store(dv_self_ptr + at, dv_self, mask_e)
    tl.store(mean_ptr + row, mean)


@autotune(PATCH_CONFIGS, key=[*KEY, "K", "HAS_INDEX"])
@triton.jit
def _patches_bwd_kernel(
    read,  # grad: [M, Q, HEADS, WIDTH]; q: [M or 1, Q or 1, HEADS, WIDTH]
    weight_ptr,  # [M, Q, HEADS, K] fp32
    d_weight_ptr,
    mean_ptr,  # [M, Q, HEADS] fp32
    slot_ptr,  # [M, Q * K] int64: the slots of an image ordered by the patch they hold, if HAS_INDEX
    begin_ptr,  # [M, N + 1] int32: where each patch's slots begin, if HAS_INDEX
    dk_ptr,  # out: [M, N, HEADS, WIDTH]
    dv_ptr,
    strides,  # of image, state and head, for each tensor of `read`
    states,
    patches,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,  # N without an index
    HAS_INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N patches of one head gather from the states that read them, in the order of the states."""
    grad_strides, q_strides = strides
    image, head, offs_n = _block(patches, HEADS, BLOCK_N)
    mask_n, offs_e = offs_n < patches, tl.arange(0, BLOCK_E)
    mask_e = offs_e < WIDTH
    grad_ptr, q_ptr = _starts(read, strides, image, head, 0)
    first_row = image * states * HEADS + head
    if HAS_INDEX:
        begin = tl.load(begin_ptr + image * (patches + 1) + offs_n, mask=mask_n, other=0)
        readers = tl.load(begin_ptr + image * (patches + 1) + offs_n + 1, mask=mask_n, other=0) - begin
        slot_ptr += image * states * K + begin
        rounds = tl.max(readers, axis=0)
    else:
        rounds = states
    dk, dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32), tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
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
        q = _load_rows(q_ptr, state * q_strides[1], offs_e, mask)
        grad = _load_rows(grad_ptr, state * grad_strides[1], offs_e, mask)
        dk += (weight * (d_weight - mean) * scale)[:, None] * q
        dv += weight[:, None] * grad
        r += 1
    at = ((image * patches + offs_n) * HEADS + head)[:, None] * WIDTH + offs_e[None, :]
    mask = mask_n[:, None] & mask_e[None, :]
    store(dk_ptr + at, dk, mask)
    store(dv_ptr + at, dv, mask)


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Outer strides of [rows, rows, heads, width] tensors, 0 where a size of 1 stands for all."""
    return tuple(tuple(0 if x.shape[dim] == 1 else x.stride(dim) for dim in (0, 1, 2)) for x in tensors)


def _constants(shape: tuple[int, ...]) -> dict[str, int]:
    return {"HEADS": shape[2], "WIDTH": shape[3], "BLOCK_E": max(2, triton.next_power_of_2(shape[3]))}


def _grid(shape: tuple[int, ...], rows: int, block: str) -> Callable[[dict[str, int]], tuple[int]]:
    """Blocks of the rows, for every head of every image."""
    return lambda sizes: (shape[0] * shape[2] * triton.cdiv(rows, sizes[block]),)


def class_attention_fwd(
    q: Tensor, k_self: Tensor, v_self: Tensor, k_patches: Tensor, v_patches: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Raw arguments as `patchlight::class_attention_fwd`."""
    shape = images, states, heads, width = state_shape(q, k_self, v_self, k_patches, index)
    patches, scale = k_patches.shape[1], scale_of(width)
    out, lse = q.new_empty(shape), q.new_empty(shape[:-1], dtype=accumulator(q.dtype))
    read = (q, k_self, v_self, k_patches, v_patches)
    if index is None:
        _all_fwd_kernel[(images * states * heads,)](
            read, out, lse, _strides(*read), states, scale, **_constants(shape), PATCHES=patches
        )
    else:
        _index_fwd_kernel[_grid(shape, states, "BLOCK_Q")](
            read, index, out, lse, _strides(*read), states, patches, scale, **_constants(shape), K=index.shape[2]
        )
    return out, lse


def class_attention_bwd(grad: Tensor, *raw) -> tuple[Tensor, ...]:
    """Gradients of the five tensors; those of q, k_self, v_self for every state, in fp32 where they are still to be summed."""
    q, k_self, v_self, k_patches, v_patches, index, lse = raw
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
        by_patch = begin = mean  # not read
        _all_states_bwd_kernel[(images * states * heads,)](
            read, lse, *written, strides, states, scale, **constants, PATCHES=patches
        )
    else:
        by_patch, begin = _slots_by_patch(index, patches)
        _index_states_bwd_kernel[_grid(shape, states, "BLOCK_Q")](
            read, index, lse, *written, strides, states, patches, scale, **constants, K=slots
        )
    gathered = weight, d_weight, mean, by_patch, begin, dk, dv
    _patches_bwd_kernel[_grid(shape, patches, "BLOCK_N")](
        read[:2], *gathered, strides[:2], states, patches, scale, **constants, K=slots, HAS_INDEX=index is not None
    )
    return (*own, dk, dv)


def _slots_by_patch(index: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """The slots [M, Q * K] in order of the patch that they hold (then of themselves), and where each patch's begin.

    A stable sort and a search: about six small kernels, and the host does not wait for any.
    """
    ordered, slot = index.flatten(1).sort(dim=1, stable=True)
    patch = torch.arange(patches + 1, dtype=index.dtype, device=index.device)
    return slot, torch.searchsorted(ordered, patch.expand(len(index), -1).contiguous(), out_int32=True)
