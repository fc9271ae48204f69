"""Triton kernels of prototype_ce: one pass over the prototypes for the loss, one for the gradients of the logits.

Both multiply rows with prototypes, or read dot products that are there already; a third does all for whole rows of those.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import hardware
from ...triton_functions import LN2, LOWEST, append, dot
from ...tuning import autotune
from .pieces import Problem

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
def _scales(scales, units_ptr, divisor_ptr):
    """What a dot product of the student, one of the teacher, and the bias are multiplied by: logits are in units of log2."""
    student, teacher = scales
    if divisor_ptr is not None:
        teacher = (teacher / tl.load(divisor_ptr)).to(tl.float32)
    bias = teacher
    if units_ptr is not None:
        student *= tl.load(units_ptr)
        teacher *= tl.load(units_ptr + 1)
    return student, teacher, bias


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
    x, teacher_x = 0, 0
    if BLOCK_D == 0 and D > 0:
        x = _load((z_ptr, starts, mask_r), offs_d, D)
        teacher_x = _load((teacher_z_ptr, teacher_starts, mask_r), offs_d, D)
    student, teacher = (z_ptr, starts, w_starts, x), (teacher_z_ptr, teacher_starts, teacher_w_starts, teacher_x)
    return first_r, mask_r, student, teacher


@triton.jit
def _dots(x, rows, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dot products [rows, BLOCK_K] of the rows with a tile of prototypes, BLOCK_D channels at a time.

    BLOCK_D 0: of all channels, and `x` has the rows already. D 0: `rows` are the dot products, and `tile` says which.
    """
    dots = tl.zeros((rows[1].shape[0], BLOCK_K), tl.float32)
    if D == 0:
        first_k, in_k, mask_k = tile
        ptr, starts, mask_r = rows
        dots = tl.load(
            ptr + first_k + (starts[:, None] + in_k[None, :]), mask=mask_r[:, None] & mask_k[None, :], other=0.0
        )
    elif BLOCK_D == 0:
        dots = dot(x, tl.trans(_load(tile, tl.arange(0, x.shape[1]), D)), dots)
    else:
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            step, w = _load(rows, offs_d, D), _load(tile, offs_d, D)
            dots = dot(step, tl.trans(w), dots)
    return dots


@triton.jit
def _teacher_logits(dots, bias_ptr, offs_k, mask_k, scale, bias_scale):
    """A teacher's logits for a tile of prototypes in units of log2, -inf for prototypes that do not exist."""
    logits = dots * scale
    if bias_ptr is not None:
        logits += (tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0) * bias_scale)[None, :]
    return tl.where(mask_k[None, :], logits, -float("inf"))


@triton.jit
def _tile(w_ptr, first_k, stride, w_starts, mask_k):
    """A tile of prototypes as `_load` takes it, or where it begins in rows of dot products, if there are no prototypes."""
    if w_ptr is None:
        return first_k, tl.arange(0, BLOCK_K), mask_k
    else:  # Triton takes one return of each type
        return w_ptr + first_k * stride, w_starts, mask_k


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

# Dot products that are there already: many programs of few rows, to have many loads under way.
DOTS_ROWS = 16
DOTS_CONFIGS = [
    triton.Config({"BLOCK_R": 16, "BLOCK_D": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_R": 32, "BLOCK_D": 64}, num_warps=4, num_stages=2),
]


@triton.jit
def _tiles_kernel(
    z_ptr,  # [S, R, D], or dot products [S, R, K]
    w_ptr,  # [K, D], or None
    teacher_z_ptr,  # [T, R, D], or dot products [T, R, K]
    teacher_w_ptr,  # [K, D], or None
    bias_ptr,  # [K] or None
    units_ptr,  # [2] or None
    divisor_ptr,  # scalar or None
    log2_student_ptr,  # out: [tiles, S, R], log2 of the sum of powers within each tile
    log2_teacher_ptr,  # out: [tiles, T, R]
    expected_ptr,  # out: [tiles, T, S, R], the student's mean logit under the teacher's probabilities within the tile
    strides,  # of view, row and prototype: the student's, then the teacher's
    R,
    scales,  # 1 / (temperature ln 2), the student's and the teacher's
    S: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,  # 0 for dot products
    WHOLE: tl.constexpr,  # D rounded up to a power of two
    TILES: tl.constexpr,  # that a program goes through
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_R positions of every view against TILES tiles of BLOCK_K prototypes.

    A tile's statistics are final, nothing is carried from one to the next: _conclude_kernel merges them.
    """
    student_strides, teacher_strides = strides
    scale, teacher_scale, bias_scale = _scales(scales, units_ptr, divisor_ptr)
    first_r, mask_r, student, teacher = _block(z_ptr, teacher_z_ptr, strides, R, D, WHOLE, BLOCK_R, BLOCK_D)
    z_ptr, starts, w_starts, x = student
    teacher_z_ptr, teacher_starts, teacher_w_starts, teacher_x = teacher
    offs_r = first_r + tl.arange(0, BLOCK_R)
    for i in range(TILES):
        number = tl.program_id(1).to(tl.int64) * TILES + i
        first_k = number * BLOCK_K
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        tile = _tile(teacher_w_ptr, first_k, teacher_strides[2], teacher_w_starts, mask_k)
        view_ptr, teachers = teacher_z_ptr, ()  # probabilities within the tile
        for t in tl.static_range(T):
            dots = _dots(teacher_x, (view_ptr, teacher_starts, mask_r), tile, D, BLOCK_D)
            logits = _teacher_logits(dots, bias_ptr, offs_k, mask_k, teacher_scale, bias_scale)
            p, log2_sum = _softmax(logits)
            tl.store(log2_teacher_ptr + (number * T + t) * R + offs_r, log2_sum, mask=mask_r)
            teachers = append(teachers, p)
            view_ptr += teacher_strides[0]

        tile = _tile(w_ptr, first_k, student_strides[2], w_starts, mask_k)
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
    units_ptr,
    divisor_ptr,
    log2_student_ptr,  # [S, R], of all prototypes
    log2_teacher_ptr,  # [T, R]
    gradient_ptr,  # out: [S, R, K]
    pair_ptr,  # [T, S]
    weight_ptr,  # [R]
    unit_ptr,  # scalar, what a gradient of 1 is stored as
    strides,
    R,
    scales,
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
    scale, teacher_scale, bias_scale = _scales(scales, units_ptr, divisor_ptr)
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
        tile = _tile(teacher_w_ptr, first_k, teacher_strides[2], teacher_w_starts, mask_k)
        view_ptr, teachers = teacher_z_ptr, ()  # probabilities
        for t in tl.static_range(T):
            dots = _dots(teacher_x, (view_ptr, teacher_starts, mask_r), tile, D, BLOCK_D)
            logits = _teacher_logits(dots, bias_ptr, offs_k, mask_k, teacher_scale, bias_scale)
            log2_sum = tl.load(log2_teacher_ptr + t * R + offs_r, mask=mask_r, other=0.0)
            teachers = append(teachers, tl.exp2(logits - log2_sum[:, None]))
            view_ptr += teacher_strides[0]
        tile = _tile(w_ptr, first_k, student_strides[2], w_starts, mask_k)
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
    s = tl.program_id(1)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
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


@triton.jit
def _whole_rows_kernel(
    student_ptr,  # [S, R, K] dot products
    teacher_ptr,  # [T, R, K]
    bias_ptr,  # [K] or None
    units_ptr,  # [2] or None
    divisor_ptr,  # scalar or None
    pair_ptr,  # [T, S]
    weight_ptr,  # [R]
    unit_ptr,  # scalar
    losses_ptr,  # out: [S, ALL]
    log2_student_ptr,  # out: [S, ALL]
    log2_teacher_ptr,  # out: [T, ALL]
    gradient_ptr,  # out: [S, R, K], or None
    scales,
    first,  # where these rows begin among ALL
    ALL,
    R,
    S: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # K rounded up to a power of two
):
    """One position of all views: sums, loss and the gradients of the logits; every dot product is read once."""
    scale, teacher_scale, bias_scale = _scales(scales, units_ptr, divisor_ptr)
    r = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < K
    weight = tl.load(weight_ptr + r)
    shift = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + offs, mask=mask, other=0.0) * bias_scale
    teachers = ()  # probabilities
    for t in tl.static_range(T):
        logits = tl.load(teacher_ptr + (t * R + r) * K + offs, mask=mask, other=0.0) * teacher_scale + shift
        logits = tl.where(mask, logits, -float("inf"))
        highest = tl.maximum(tl.max(logits, axis=0), LOWEST)
        powers = tl.exp2(logits - highest)
        total = tl.sum(powers, axis=0)
        tl.store(log2_teacher_ptr + t * ALL + first + r, highest + _log2(total))
        teachers = append(teachers, powers / total)
    for s in range(S):
        logits = tl.load(student_ptr + (s * R + r) * K + offs, mask=mask, other=0.0) * scale
        highest = tl.maximum(tl.max(tl.where(mask, logits, -float("inf")), axis=0), LOWEST)
        total = tl.sum(tl.where(mask, tl.exp2(logits - highest), 0.0), axis=0)
        log2_sum = highest + _log2(total)
        p = tl.exp2(logits - log2_sum)
        loss = 0.0
        gradient = tl.zeros((BLOCK,), tl.float32)
        for t in tl.static_range(T):
            pair = tl.load(pair_ptr + t * S + s)
            loss += pair * (log2_sum - tl.sum(teachers[t] * logits, axis=0))
            gradient += pair * (p - teachers[t])
        tl.store(losses_ptr + s * ALL + first + r, loss * weight * LN2)
        tl.store(log2_student_ptr + s * ALL + first + r, log2_sum)
        if gradient_ptr is not None:
            gradient = (gradient * (weight * tl.load(unit_ptr))).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + (s * R + r) * K + offs, gradient, mask=mask)


KEY = ["S", "T", "K", "D"]


def _tuned(kernel) -> tuple:
    """The kernel for fp32, for one student and one teacher view, for several, and for dot products."""
    kinds = FLOAT32_CONFIGS, ONE_PAIR_CONFIGS, CONFIGS, DOTS_CONFIGS
    return tuple(autotune(configs, key=KEY)(kernel) for configs in kinds)


_TILES_KERNELS = _tuned(_tiles_kernel)
_GRADIENT_KERNELS = _tuned(_gradient_kernel)


def _scales_of(p: Problem) -> tuple[float, float]:
    return LOG2E / p.temperature, LOG2E / p.teacher_temperature


def _launch(kernels: tuple, p: Problem, programs: int, tiles: int, *statistics: Tensor) -> None:
    """The kernel over all positions, with `programs` along the prototypes that take `tiles` tiles each."""
    S, T, R, K = p.sizes
    D = 0 if p.prototypes is None else p.z.shape[2]  # 0: dot products
    w_strides = [1 if w is None else w.stride(0) for w in (p.prototypes, p.teacher_prototypes)]
    strides = (*p.z.stride()[:2], w_strides[0]), (*p.teacher_z.stride()[:2], w_strides[1])
    one_pair = S * T == 1 and D <= 256  # more channels would not fit
    kernel = kernels[3 if D == 0 else 0 if p.z.dtype == torch.float32 else 1 if one_pair else 2]
    kernel[lambda sizes: (triton.cdiv(R, sizes["BLOCK_R"]), programs)](
        p.z, p.prototypes, p.teacher_z, p.teacher_prototypes, p.bias, p.units, p.teacher_divisor, *statistics,
        strides, R, _scales_of(p),
        S=S, T=T, K=K, D=D, WHOLE=max(16, triton.next_power_of_2(D)), TILES=tiles,
    )  # fmt: skip


def _split(p: Problem) -> tuple[int, int]:
    """Programs along the prototypes and tiles of each, so that there are four programs for each multiprocessor."""
    _, _, R, K = p.sizes
    tiles, rows = triton.cdiv(K, BLOCK_K.value), DOTS_ROWS if p.prototypes is None else 64
    programs = min(tiles, triton.cdiv(4 * _multiprocessors(p.z.device), triton.cdiv(R, rows)))
    each = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, each), each


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1  # few programs are faster in the interpreter


def tiles(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """For every tile log2 of the students' and the teachers' sums, and the students' mean logits."""
    S, T, R, _ = p.sizes
    programs, each = _split(p)
    count = programs * each
    empty = lambda *sizes: p.pair_weight.new_empty(sizes)
    partial = empty(count, S, R), empty(count, T, R), empty(count, T, S, R)
    _launch(_TILES_KERNELS, p, programs, each, *partial)
    return partial


def merge(
    student: Tensor, teacher: Tensor, expected: Tensor, pair_weight: Tensor, row_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and log2 of the students' and the teachers' sums, from all tiles."""
    count, T, S, R = expected.shape
    loss, log2_student, log2_teacher = (pair_weight.new_empty((views, R)) for views in (S, S, T))
    block_r, block_t = 32, min(64, triton.next_power_of_2(count))
    _conclude_kernel[(triton.cdiv(R, block_r), S)](
        student, teacher, expected, pair_weight, row_weight, log2_student, log2_teacher, loss, R,
        S=S, T=T, TILES=count, BLOCK_T=block_t, BLOCK_R=block_r,
    )  # fmt: skip
    return loss.sum(), log2_student, log2_teacher


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What gradients are stored in: the interpreter cuts bf16 off unrounded."""
    return torch.float32 if dtype == torch.bfloat16 and hardware.triton_interpreted() else dtype


def grad_logits(p: Problem, log2_student: Tensor, log2_teacher: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the student's logits, [S, R, K]: weights times unit (p_student - p_teacher)."""
    S, _, R, K = p.sizes
    out = p.z.new_empty((S, R, K), dtype=_stored(dtype))
    programs, each = _split(p)
    _launch(_GRADIENT_KERNELS, p, programs, each, log2_student, log2_teacher, out, p.pair_weight, p.row_weight, unit)
    return out


def whole_rows(
    p: Problem,
    unit: Tensor,
    dtype: torch.dtype | None,
    first: int,
    losses: Tensor,
    log2_student: Tensor,
    log2_teacher: Tensor,
) -> Tensor | None:
    """Dot products with all prototypes: writes losses and sums of these rows, gives the gradients of their logits."""
    S, T, R, K = p.sizes
    gradient = None if dtype is None else torch.empty_like(p.z, dtype=_stored(dtype))
    block = triton.next_power_of_2(K)
    _whole_rows_kernel[(R,)](
        p.z, p.teacher_z, p.bias, p.units, p.teacher_divisor, p.pair_weight, p.row_weight, unit,
        losses, log2_student, log2_teacher, gradient, _scales_of(p), first, losses.shape[1], R,
        S=S, T=T, K=K, BLOCK=block, num_warps=min(16, max(4, block // 1024)),
    )  # fmt: skip
    return gradient
