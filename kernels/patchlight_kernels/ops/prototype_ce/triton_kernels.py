"""Triton kernels of prototype_ce: one pass over the prototypes for the loss, one for the gradients of the logits."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import hardware
from ...tuning import autotune

LOG2E = 1 / math.log(2)
LN2 = tl.constexpr(math.log(2))
BLOCK_K = 64  # prototypes of a tile; wider ones spill registers when there are two teachers
LOWEST = tl.constexpr(-3.0e38)  # a finite stand-in for the maximum of a tile in which every logit is -inf


@triton.jit
def _load(ptr, offs, mask, offs_d, D: tl.constexpr):
    """Channels offs_d of the rows that start at offs: [rows, channels], zero where there is nothing.

    Only `ptr` counts in 64 bits; within a block of rows 32 do, and take half the registers.
    """
    return tl.load(ptr + (offs[:, None] + offs_d[None, :]), mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _dot(x, w, dots, FLOAT32_PRODUCTS: tl.constexpr):
    """dots + x w in fp32."""
    if FLOAT32_PRODUCTS:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), dots, input_precision="ieee")
    return tl.dot(x, w, dots)


@triton.jit
def _dot_in_steps(
    x_ptr,
    x_offs,
    x_mask,
    w_ptr,
    w_offs,
    w_mask,
    dots,
    D: tl.constexpr,
    FLOAT32_PRODUCTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same of rows in memory, BLOCK_D channels at a time."""
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        x, w = _load(x_ptr, x_offs, x_mask, offs_d, D), _load(w_ptr, w_offs, w_mask, offs_d, D)
        dots = _dot(x, tl.trans(w), dots, FLOAT32_PRODUCTS)
    return dots


@triton.jit
def _log2(total):
    """-inf for nothing, without asking the interpreter for log2(0); NaN stays NaN."""
    return tl.where(total == 0, -float("inf"), tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def _softmax(logits):
    """Probabilities of powers of two within a tile, and the log2 of their sum before normalising."""
    highest = tl.maximum(tl.max(logits, axis=1), LOWEST)
    powers = tl.exp2(logits - highest[:, None])
    total = tl.sum(powers, axis=1)
    return powers / tl.where(total == 0, 1.0, total)[:, None], highest + _log2(total)


# fp32 products do not use tensor cores and keep their operands in registers: they want short steps.
FLOAT32_CONFIGS = [
    triton.Config({"BLOCK_R": 32, "BLOCK_D": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_R": 32, "BLOCK_D": 16}, num_warps=8, num_stages=2),
]
CONFIGS = [
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 128}, num_warps=8, num_stages=2),
]
# One student and one teacher view: BLOCK_D 0 keeps their rows, with all channels, while the tiles of prototypes pass by.
ONE_PAIR_CONFIGS = [
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 0}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_R": 64, "BLOCK_D": 0}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_R": 128, "BLOCK_D": 64}, num_warps=8, num_stages=2),
]


@triton.jit
def _stream_kernel(
    z_ptr,  # [S, R, D]
    w_ptr,  # [K, D]
    teacher_z_ptr,  # [T, R, D]
    teacher_w_ptr,  # [K, D]
    bias_ptr,  # [K], if HAS_BIAS
    student_ptr,  # log2 of the sum of powers: out [tiles, S, R] within each tile; GRADIENT: in [S, R] of all
    teacher_ptr,  # out [tiles, T, R]; GRADIENT: in [T, R]
    expected_ptr,  # out [tiles, T, S, R]: the student's mean logit under the teacher's probabilities within the tile
    gradient_ptr,  # GRADIENT: out [S, R, K]
    pair_ptr,  # GRADIENT: [T, S]
    weight_ptr,  # GRADIENT: [R]
    unit_ptr,  # GRADIENT: scalar, what a gradient of 1 is stored as
    stride_view,
    stride_row,
    stride_w,
    stride_teacher_view,
    stride_teacher_row,
    stride_teacher_w,
    R,
    scale,  # 1 / (temperature ln 2)
    teacher_scale,
    S: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,  # D rounded up to a power of two
    TILES: tl.constexpr,  # that a program goes through
    GRADIENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLOAT32_PRODUCTS: tl.constexpr,  # the interpreter multiplies bf16 wrongly, and fp32 must not become tf32
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_R positions of every view against TILES tiles of BLOCK_K prototypes.

    A tile's statistics are final, nothing is carried from one to the next: _conclude_kernel merges them.
    GRADIENT: row_weight (sum_t pair_weight[t] (p_student - p_teacher[t])), the gradient of the student's logits.
    """
    ROWS_STAY: tl.constexpr = BLOCK_D == 0
    first_r = tl.program_id(0).to(tl.int64) * BLOCK_R
    in_r, in_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    offs_r = first_r + in_r
    mask_r = offs_r < R
    rows, teacher_rows = in_r * stride_row, in_r * stride_teacher_row
    w_rows, teacher_w_rows = in_k * stride_w, in_k * stride_teacher_w
    z_ptr += first_r * stride_row
    teacher_z_ptr += first_r * stride_teacher_row
    offs_d = tl.arange(0, WHOLE)
    zeros = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if ROWS_STAY:
        x = _load(z_ptr, rows, mask_r, offs_d, D)
        teacher_x = _load(teacher_z_ptr, teacher_rows, mask_r, offs_d, D)
    if GRADIENT:
        weight = tl.load(weight_ptr + offs_r, mask=mask_r, other=0.0) * tl.load(unit_ptr)

    for i in range(TILES):
        tile = tl.program_id(1).to(tl.int64) * TILES + i
        first_k = tile * BLOCK_K
        offs_k = first_k + in_k
        mask_k = offs_k < K
        tile_ptr = teacher_w_ptr + first_k * stride_teacher_w
        view_ptr = teacher_z_ptr
        teachers = ()  # probabilities: within the tile, or GRADIENT: of all prototypes
        for t in tl.static_range(T):
            if ROWS_STAY:
                w = _load(tile_ptr, teacher_w_rows, mask_k, offs_d, D)
                dots = _dot(teacher_x, tl.trans(w), zeros, FLOAT32_PRODUCTS)
            else:
                dots = _dot_in_steps(
                    view_ptr, teacher_rows, mask_r, tile_ptr, teacher_w_rows, mask_k, zeros,
                    D, FLOAT32_PRODUCTS, BLOCK_D,
                )  # fmt: skip
            if HAS_BIAS:
                dots += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
            logits = tl.where(mask_k[None, :], dots * teacher_scale, -float("inf"))
            if GRADIENT:
                log2_sum = tl.load(teacher_ptr + t * R + offs_r, mask=mask_r, other=0.0)
                teachers = teachers + (tl.exp2(logits - log2_sum[:, None]),)  # noqa: RUF005
            else:
                p, log2_sum = _softmax(logits)
                tl.store(teacher_ptr + (tile * T + t) * R + offs_r, log2_sum, mask=mask_r)
                teachers = teachers + (p,)  # noqa: RUF005
            view_ptr += stride_teacher_view

        tile_ptr = w_ptr + first_k * stride_w
        view_ptr = z_ptr
        if GRADIENT:
            out_ptr = gradient_ptr + first_r * K + first_k
        for s in range(S):
            if ROWS_STAY:
                w = _load(tile_ptr, w_rows, mask_k, offs_d, D)
                dots = _dot(x, tl.trans(w), zeros, FLOAT32_PRODUCTS)
            else:
                dots = _dot_in_steps(
                    view_ptr, rows, mask_r, tile_ptr, w_rows, mask_k, zeros, D, FLOAT32_PRODUCTS, BLOCK_D
                )
            logits = dots * scale
            if GRADIENT:
                log2_sum = tl.load(student_ptr + s * R + offs_r, mask=mask_r, other=0.0)
                p = tl.exp2(logits - log2_sum[:, None])
                gradient = zeros
                for t in tl.static_range(T):
                    gradient += tl.load(pair_ptr + t * S + s) * (p - teachers[t])
                gradient = (gradient * weight[:, None]).to(gradient_ptr.dtype.element_ty)
                tl.store(
                    out_ptr + (in_r[:, None] * K + in_k[None, :]), gradient, mask=mask_r[:, None] & mask_k[None, :]
                )
                out_ptr += R.to(tl.int64) * K
            else:
                _, log2_sum = _softmax(tl.where(mask_k[None, :], logits, -float("inf")))
                tl.store(student_ptr + (tile * S + s) * R + offs_r, log2_sum, mask=mask_r)
                for t in tl.static_range(T):
                    expected = tl.sum(teachers[t] * logits, axis=1)
                    tl.store(expected_ptr + ((tile * T + t) * S + s) * R + offs_r, expected, mask=mask_r)
            view_ptr += stride_view


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
    student_ptr,  # [TILES, S, R] as _stream_kernel left them
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


KEY = ["S", "T", "K", "D", "GRADIENT"]
_float32_stream = autotune(FLOAT32_CONFIGS, key=KEY)(_stream_kernel)
_stream = autotune(CONFIGS, key=KEY)(_stream_kernel)
_one_pair_stream = autotune(ONE_PAIR_CONFIGS, key=KEY)(_stream_kernel)


def _launch(raw: tuple, programs: int, tiles: int, outputs: tuple, gradient: bool) -> None:
    """The kernel over all positions, with `programs` along the prototypes that take `tiles` tiles each."""
    z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, *_, bias, _ = raw
    (S, R, D), T, float32 = z.shape, len(teacher_z), z.dtype == torch.float32

    def grid(meta):
        return triton.cdiv(R, meta["BLOCK_R"]), programs

    one_pair = S * T == 1 and D <= 256  # more channels would not fit
    kernel = _float32_stream if float32 else _one_pair_stream if one_pair else _stream
    kernel[grid](
        z, prototypes, teacher_z, teacher_prototypes, bias, *outputs,
        *z.stride()[:2], prototypes.stride(0), *teacher_z.stride()[:2], teacher_prototypes.stride(0),
        R, LOG2E / temperature, LOG2E / teacher_temperature,
        S=S, T=T, K=len(prototypes), D=D, WHOLE=max(16, triton.next_power_of_2(D)), TILES=tiles,
        GRADIENT=gradient, HAS_BIAS=bias is not None, FLOAT32_PRODUCTS=float32 or hardware.triton_interpreted(),
        BLOCK_K=BLOCK_K,
    )  # fmt: skip


def _split(z: Tensor, prototypes: Tensor) -> tuple[int, int]:
    """Programs along the prototypes and tiles of each, so that the whole GPU has work four times over."""
    tiles = triton.cdiv(len(prototypes), BLOCK_K)
    programs = min(tiles, triton.cdiv(4 * _multiprocessors(z.device), triton.cdiv(z.shape[1], 64)))
    each = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, each), each


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1  # the interpreter likes few programs


def prototype_ce_fwd(*raw) -> tuple[Tensor, Tensor, Tensor]:
    """Raw arguments as `patchlight::prototype_ce_fwd`: the loss, and log2 of the students' and the teachers' sums."""
    z, prototypes, teacher_z, *_, pair_weight, row_weight, _, _ = raw
    (S, R, _), T = z.shape, len(teacher_z)
    split = _split(z, prototypes)
    tiles = split[0] * split[1]
    empty = lambda *sizes: pair_weight.new_empty(sizes)
    partial = empty(tiles, S, R), empty(tiles, T, R), empty(tiles, T, S, R)
    _launch(raw, *split, (*partial, None, None, None, None), gradient=False)
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
    outputs = log2_student, log2_teacher, None, out, pair_weight, row_weight, unit
    _launch(raw, *_split(z, prototypes), outputs, gradient=True)
    return out
