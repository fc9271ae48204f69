"""Triton kernels of prototype_ce: one pass over the prototypes for the loss, one for the gradients of the logits."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import hardware
from ...triton_functions import LN2, LOWEST, append, dot
from ...tuning import autotune

LOG2E = 1 / math.log(2)
BLOCK_K = tl.constexpr(64)  # prototypes of a tile; wider ones spill registers when there are two teachers


@triton.jit
def _load(rows, offs_d, D: tl.constexpr):
    """Channels offs_d of rows, given as (pointer, where each row starts, mask): [rows, channels], zero where there is nothing.

    Only the pointer counts in 64 bits; within a block of rows 32 do, and take half the registers.
    """
    ptr, starts, mask = rows
    return tl.load(ptr + (starts[:, None] + offs_d[None, :]), mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _block(
    z_ptr, teacher_z_ptr, strides, R, D: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The program's first position and which of its BLOCK_R positions exist; then for student and teacher: where the first
    view begins, where each row does, where each prototype of a tile does and, if BLOCK_D is 0, the rows themselves.
    """
    student_strides, teacher_strides = strides
    first_r = tl.program_id(0).to(tl.int64) * BLOCK_R
    in_r, in_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    mask_r = first_r + in_r < R
    starts, teacher_starts = in_r * student_strides[1], in_r * teacher_strides[1]
    w_starts, teacher_w_starts = in_k * student_strides[2], in_k * teacher_strides[2]
    z_ptr += first_r * student_strides[1]
    teacher_z_ptr += first_r * teacher_strides[1]
    offs_d = tl.arange(0, WHOLE)
    x = _load((z_ptr, starts, mask_r), offs_d, D) if BLOCK_D == 0 else 0
    teacher_x = _load((teacher_z_ptr, teacher_starts, mask_r), offs_d, D) if BLOCK_D == 0 else 0
    student, teacher = (z_ptr, starts, w_starts, x), (teacher_z_ptr, teacher_starts, teacher_w_starts, teacher_x)
    return first_r, mask_r, student, teacher


@triton.jit
def _dots(x, rows, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dot products [rows, BLOCK_K] of the rows with a tile of prototypes, BLOCK_D channels at a time.

    BLOCK_D 0: of all channels, and `x` has the rows already.
    """
    dots = tl.zeros((rows[1].shape[0], BLOCK_K), tl.float32)
    if BLOCK_D == 0:
        dots = dot(x, tl.trans(_load(tile, tl.arange(0, x.shape[1]), D)), dots)
    else:
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            step, w = _load(rows, offs_d, D), _load(tile, offs_d, D)
            dots = dot(step, tl.trans(w), dots)
    return dots


@triton.jit
def _teacher_logits(dots, bias_ptr, offs_k, mask_k, scale):
    """A teacher's logits for a tile of prototypes in units of log2, -inf for prototypes that do not exist."""
    if bias_ptr is not None:
        dots += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
    return tl.where(mask_k[None, :], dots * scale, -float("inf"))


@triton.jit
def _log2(total):
    """log2 of a sum: -inf for 0, without a log2(0), of which the interpreter warns; NaN stays NaN."""
    return tl.where(total == 0, -float("inf"), tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def _softmax(logits):
    """Probabilities of powers of two within a tile, and the log2 of their sum before normalizing."""
    highest = tl.maximum(tl.max(logits, axis=1), LOWEST)
    powers = tl.exp2(logits - highest[:, None])
    total = tl.sum(powers, axis=1)
    return powers / tl.where(total == 0, 1.0, total)[:, None], highest + _log2(total)


# fp32 products do not use tensor cores and keep their operands in registers, so steps are short.
FLOAT32_CONFIGS = [
    triton.Config({"BLOCK_R": 32, "BLOCK_D": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_R": 32, "BLOCK_D": 16}, num_warps=8, num_stages=2),
]
CONFIGS = [
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 128}, num_warps=8, num_stages=2),
]
# One student and one teacher view: BLOCK_D 0 keeps their rows, with all channels, for all tiles of prototypes.
ONE_PAIR_CONFIGS = [
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 0}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 0}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_R": 128, "BLOCK_D": 64}, num_warps=8, num_stages=2),
]


@triton.jit
def _tiles_kernel(
    z_ptr,  # [S, R, D]
    w_ptr,  # [K, D]
    teacher_z_ptr,  # [T, R, D]
    teacher_w_ptr,  # [K, D]
    bias_ptr,  # [K] or None
    log2_student_ptr,  # out: [tiles, S, R], log2 of the sum of powers within each tile
    log2_teacher_ptr,  # out: [tiles, T, R]
    expected_ptr,  # out: [tiles, T, S, R], the student's mean logit under the teacher's probabilities within the tile
    strides,  # of view, row and prototype: the student's, then the teacher's
    R,
    scale,  # 1 / (temperature ln 2)
    teacher_scale,
    S: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,  # D rounded up to a power of two
    TILES: tl.constexpr,  # that a program goes through
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_R positions of every view against TILES tiles of BLOCK_K prototypes.

    A tile's statistics are final, nothing is carried from one to the next: _conclude_kernel merges them.
    """
    student_strides, teacher_strides = strides
    first_r, mask_r, student, teacher = _block(z_ptr, teacher_z_ptr, strides, R, D, WHOLE, BLOCK_R, BLOCK_D)
    z_ptr, starts, w_starts, x = student
    teacher_z_ptr, teacher_starts, teacher_w_starts, teacher_x = teacher
    offs_r = first_r + tl.arange(0, BLOCK_R)
    for i in range(TILES):
        number = tl.program_id(1).to(tl.int64) * TILES + i
        first_k = number * BLOCK_K
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        tile = teacher_w_ptr + first_k * teacher_strides[2], teacher_w_starts, mask_k
        view_ptr, teachers = teacher_z_ptr, ()  # probabilities within the tile
        for t in tl.static_range(T):
            dots = _dots(teacher_x, (view_ptr, teacher_starts, mask_r), tile, D, BLOCK_D)
            logits = _teacher_logits(dots, bias_ptr, offs_k, mask_k, teacher_scale)
            p, log2_sum = _softmax(logits)
            tl.store(log2_teacher_ptr + (number * T + t) * R + offs_r, log2_sum, mask=mask_r)
            teachers = append(teachers, p)
            view_ptr += teacher_strides[0]

        tile = w_ptr + first_k * student_strides[2], w_starts, mask_k
        view_ptr = z_ptr
        for s in range(S):
            logits = _dots(x, (view_ptr, starts, mask_r), tile, D, BLOCK_D) * scale
            _, log2_sum = _softmax(tl.where(mask_k[None, :], logits, -float("inf")))
            tl.store(log2_student_ptr + (number * S + s) * R + offs_r, log2_sum, mask=mask_r)
            for t in tl.static_range(T):
                expected = tl.sum(teachers[t] * logits, axis=1)
                tl.store(expected_ptr + ((number * T + t) * S + s) * R + offs_r, expected, mask=mask_r)
            view_ptr += student_strides[0]


@triton.jit
def _gradient_kernel(
    z_ptr,  # as above
    w_ptr,
    teacher_z_ptr,
    teacher_w_ptr,
    bias_ptr,
    log2_student_ptr,  # [S, R], of all prototypes
    log2_teacher_ptr,  # [T, R]
    gradient_ptr,  # out: [S, R, K]
    pair_ptr,  # [T, S]
    weight_ptr,  # [R]
    unit_ptr,  # scalar, what a gradient of 1 is stored as
    strides,
    R,
    scale,
    teacher_scale,
    S: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of the student's logits, row_weight (sum_t pair_weight[t] (p_student - p_teacher[t])), tile by tile."""
    student_strides, teacher_strides = strides
    first_r, mask_r, student, teacher = _block(z_ptr, teacher_z_ptr, strides, R, D, WHOLE, BLOCK_R, BLOCK_D)
    z_ptr, starts, w_starts, x = student
    teacher_z_ptr, teacher_starts, teacher_w_starts, teacher_x = teacher
    offs_r = first_r + tl.arange(0, BLOCK_R)
    in_r, in_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    weight = tl.load(weight_ptr + offs_r, mask=mask_r, other=0.0) * tl.load(unit_ptr)
    for i in range(TILES):
        first_k = (tl.program_id(1).to(tl.int64) * TILES + i) * BLOCK_K
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        tile = teacher_w_ptr + first_k * teacher_strides[2], teacher_w_starts, mask_k
        view_ptr, teachers = teacher_z_ptr, ()  # probabilities
        for t in tl.static_range(T):
            dots = _dots(teacher_x, (view_ptr, teacher_starts, mask_r), tile, D, BLOCK_D)
            logits = _teacher_logits(dots, bias_ptr, offs_k, mask_k, teacher_scale)
            log2_sum = tl.load(log2_teacher_ptr + t * R + offs_r, mask=mask_r, other=0.0)
            teachers = append(teachers, tl.exp2(logits - log2_sum[:, None]))
            view_ptr += teacher_strides[0]
        tile = w_ptr + first_k * student_strides[2], w_starts, mask_k
        view_ptr = z_ptr
        out_ptr = gradient_ptr + first_r * K + first_k
        for s in range(S):
            logits = _dots(x, (view_ptr, starts, mask_r), tile, D, BLOCK_D) * scale
            log2_sum = tl.load(log2_student_ptr + s * R + offs_r, mask=mask_r, other=0.0)
            p = tl.exp2(logits - log2_sum[:, None])
            gradient = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
            for t in tl.static_range(T):
                gradient += tl.load(pair_ptr + t * S + s) * (p - teachers[t])
            gradient = (gradient * weight[:, None]).to(gradient_ptr.dtype.element_ty)
            mask = mask_r[:, None] & mask_k[None, :]
            tl.store(out_ptr + (in_r[:, None] * K + in_k[None, :]), gradient, mask=mask)
            out_ptr += tl.cast(R, tl.int64) * K  # R is a constant if it is 1
            view_ptr += student_strides[0]


@triton.jit
def _merge(ptr, stride, offs_r, mask_r, TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """log2 of the sum over tiles of powers of two."""
    highest = tl.full((BLOCK_R,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, TILES, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask = (offs_t < TILES)[:, None] & mask_r[None, :]
        x = tl.load(ptr + offs_t.to(tl.int64)[:, None] * stride + offs_r[None, :], mask=mask, other=-float("inf"))
        higher = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(x - higher[None, :]), axis=0)
        highest = higher
    return tl.where(mask_r, highest + _log2(total), 0.0)


@triton.jit
def _conclude_kernel(
    student_ptr,  # [TILES, S, R] as _tiles_kernel left them
    teacher_ptr,
    expected_ptr,
    pair_ptr,  # [T, S]
    weight_ptr,  # [R]
    log2_student_ptr,  # out: [S, R]
    log2_teacher_ptr,  # out: [T, R]
    loss_ptr,  # out: [S, R]
    R,
    S: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One student view, BLOCK_R positions: what the tiles add up to."""
    s = tl.program_id(0)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    log2_student = _merge(student_ptr + s * R, S * R, offs_r, mask_r, TILES, BLOCK_T, BLOCK_R)
    tl.store(log2_student_ptr + s * R + offs_r, log2_student, mask=mask_r)
    loss = tl.zeros((BLOCK_R,), tl.float32)
    for t in tl.static_range(T):
        log2_teacher = _merge(teacher_ptr + t * R, T * R, offs_r, mask_r, TILES, BLOCK_T, BLOCK_R)
        if s == 0:
            tl.store(log2_teacher_ptr + t * R + offs_r, log2_teacher, mask=mask_r)
        expected = tl.zeros((BLOCK_R,), tl.float32)
        for first in range(0, TILES, BLOCK_T):
            offs_t = first + tl.arange(0, BLOCK_T)
            mask = (offs_t < TILES)[:, None] & mask_r[None, :]
            of_teacher = (offs_t.to(tl.int64)[:, None] * T + t) * R + offs_r[None, :]
            of_pair = ((offs_t.to(tl.int64)[:, None] * T + t) * S + s) * R + offs_r[None, :]
            share = tl.exp2(tl.load(teacher_ptr + of_teacher, mask=mask, other=-float("inf")) - log2_teacher[None, :])
            expected += tl.sum(share * tl.load(expected_ptr + of_pair, mask=mask, other=0.0), axis=0)
        loss += tl.load(pair_ptr + t * S + s) * (log2_student - expected)
    weight = tl.load(weight_ptr + offs_r, mask=mask_r, other=0.0)
    tl.store(loss_ptr + s * R + offs_r, loss * weight * LN2, mask=mask_r)


KEY = ["S", "T", "K", "D"]


def _tuned(kernel) -> tuple:
    """The kernel for fp32, for one student and one teacher view, and for several."""
    return tuple(autotune(configs, key=KEY)(kernel) for configs in (FLOAT32_CONFIGS, ONE_PAIR_CONFIGS, CONFIGS))


_TILES_KERNELS = _tuned(_tiles_kernel)
_GRADIENT_KERNELS = _tuned(_gradient_kernel)


def _launch(kernels: tuple, raw: tuple, programs: int, tiles: int, *statistics: Tensor) -> None:
    """The kernel over all positions, with `programs` along the prototypes that take `tiles` tiles each."""
    z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, *_, bias, _ = raw
    (S, R, D), T, float32 = z.shape, len(teacher_z), z.dtype == torch.float32
    strides = (*z.stride()[:2], prototypes.stride(0)), (*teacher_z.stride()[:2], teacher_prototypes.stride(0))
    one_pair = S * T == 1 and D <= 256  # more channels would not fit
    kernel = kernels[0 if float32 else 1 if one_pair else 2]
    kernel[lambda sizes: (triton.cdiv(R, sizes["BLOCK_R"]), programs)](
        z, prototypes, teacher_z, teacher_prototypes, bias, *statistics,
        strides, R, LOG2E / temperature, LOG2E / teacher_temperature,
        S=S, T=T, K=len(prototypes), D=D, WHOLE=max(16, triton.next_power_of_2(D)), TILES=tiles,
    )  # fmt: skip


def _split(z: Tensor, prototypes: Tensor) -> tuple[int, int]:
    """Programs along the prototypes and tiles of each, so that there are four programs for each multiprocessor."""
    tiles = triton.cdiv(len(prototypes), BLOCK_K.value)
    programs = min(tiles, triton.cdiv(4 * _multiprocessors(z.device), triton.cdiv(z.shape[1], 64)))
    each = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, each), each


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1  # few programs are faster in the interpreter


def prototype_ce_fwd(*raw) -> tuple[Tensor, Tensor, Tensor]:
    """Raw arguments as `patchlight::prototype_ce_fwd`: the loss, and log2 of the students' and the teachers' sums."""
    z, prototypes, teacher_z, *_, pair_weight, row_weight, _, _ = raw
    (S, R, _), T = z.shape, len(teacher_z)
    programs, each = _split(z, prototypes)
    tiles = programs * each
    empty = lambda *sizes: pair_weight.new_empty(sizes)
    partial = empty(tiles, S, R), empty(tiles, T, R), empty(tiles, T, S, R)
    _launch(_TILES_KERNELS, raw, programs, each, *partial)
    loss, log2_student, log2_teacher = empty(S, R), empty(S, R), empty(T, R)
    block_r, block_t = 32, min(64, triton.next_power_of_2(tiles))
    _conclude_kernel[(S, triton.cdiv(R, block_r))](
        *partial, pair_weight, row_weight, log2_student, log2_teacher, loss, R,
        S=S, T=T, TILES=tiles, BLOCK_T=block_t, BLOCK_R=block_r,
    )  # fmt: skip
    return loss.sum(), log2_student, log2_teacher


def grad_logits(raw: tuple, log2_student: Tensor, log2_teacher: Tensor, unit: Tensor) -> Tensor:
    """The gradient of the student's logits, [S, R, K] in the dtype of z: weights times unit (p_student - p_teacher)."""
    z, prototypes, *_, pair_weight, row_weight, _, _ = raw
    dtype = torch.float32 if hardware.triton_interpreted() else z.dtype  # the interpreter cuts bf16 off unrounded
    out = z.new_empty((*z.shape[:2], len(prototypes)), dtype=dtype)
    programs, each = _split(z, prototypes)
    _launch(_GRADIENT_KERNELS, raw, programs, each, log2_student, log2_teacher, out, pair_weight, row_weight, unit)
    return out
