"""Triton kernels of self_relation: one pass over the rows for the loss, one for the gradient; relations stay in registers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import hardware
from ...tuning import autotune
from . import reference

LOG2E = 1 / math.log(2)
LN2 = tl.constexpr(math.log(2))
UNIT = tl.constexpr(reference.UNIT)
LOWEST = tl.constexpr(-3.0e38)  # below every finite relation
PULLED = 256  # channels of the gradient that a program holds
PULLED_FLOAT32 = 64


@triton.jit
def _dot(x, y, dots, FLOAT32_PRODUCTS: tl.constexpr):
    """dots + x y in fp32."""
    if FLOAT32_PRODUCTS:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), dots, input_precision="ieee")
    return tl.dot(x, y, dots)


@triton.jit
def _relation(
    ptr,
    rows_n,
    mask_n,
    rows_m,
    mask_m,
    stride_e,
    scale,
    E: tl.constexpr,
    FLOAT32_PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The rows that start at rows_n against those at rows_m, in units of log2."""
    dots = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        in_e, mask_e = offs_e * stride_e, offs_e < E
        x = tl.load(ptr + (rows_n[:, None] + in_e[None, :]), mask=mask_n[:, None] & mask_e[None, :], other=0.0)
        y = tl.load(ptr + (rows_m[None, :] + in_e[:, None]), mask=mask_m[None, :] & mask_e[:, None], other=0.0)
        dots = _dot(x, y, dots, FLOAT32_PRODUCTS)
    return dots * scale


CONFIGS = [
    triton.Config({"BLOCK": 64, "BLOCK_E": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 64, "BLOCK_E": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK": 64, "BLOCK_E": 32}, num_warps=4, num_stages=3),
]
# fp32 products do not use tensor cores and keep their operands in registers: they want short steps.
FLOAT32_CONFIGS = [
    triton.Config({"BLOCK": 32, "BLOCK_E": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 64, "BLOCK_E": 16}, num_warps=8, num_stages=2),
]
PULL_CONFIGS = [
    triton.Config({"BLOCK": 64, "BLOCK_E": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK": 64, "BLOCK_E": 32}, num_warps=8, num_stages=3),
]
FLOAT32_PULL_CONFIGS = [triton.Config({"BLOCK": 32, "BLOCK_E": 16}, num_warps=8, num_stages=2)]


@triton.jit
def _score_kernel(
    student_ptr,  # [S, B, G, N, E], any strides
    teacher_ptr,  # [B, G, N, F], any strides
    weight_ptr,  # [S, B]
    log2_student_ptr,  # out: [S, B, G, N] log2 of the sum of powers
    log2_teacher_ptr,  # out: [B, G, N]
    loss_ptr,  # out: [S, B, G, blocks of rows]
    stride_s,
    stride_b,
    stride_g,
    stride_n,
    stride_e,
    teacher_stride_b,
    teacher_stride_g,
    teacher_stride_n,
    teacher_stride_e,
    B,
    G,
    scale,
    teacher_scale,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    FLOAT32_PRODUCTS: tl.constexpr,  # the interpreter multiplies bf16 wrongly, and fp32 must not become tf32
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK rows of one view, image and head against all rows: both softmax sums, and the cross-entropy."""
    sample = tl.program_id(1).to(tl.int64)
    s, b, g = sample // (B * G), sample // G % B, sample % G
    student_ptr += s * stride_s + b * stride_b + g * stride_g
    teacher_ptr += b * teacher_stride_b + g * teacher_stride_g
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    teacher_highest = tl.full((BLOCK,), LOWEST, tl.float32)
    teacher_total = tl.zeros((BLOCK,), tl.float32)
    expected = tl.zeros((BLOCK,), tl.float32)  # the student's relations weighed by the teacher's powers
    for start in range(0, N, BLOCK):
        offs_m = start + tl.arange(0, BLOCK)
        mask_m = offs_m < N
        t = _relation(
            teacher_ptr, offs_n * teacher_stride_n, mask_n, offs_m * teacher_stride_n, mask_m, teacher_stride_e,
            teacher_scale, F, FLOAT32_PRODUCTS, BLOCK, BLOCK_E,
        )  # fmt: skip
        t = tl.where(mask_m[None, :], t, -float("inf"))
        higher = tl.maximum(teacher_highest, tl.max(t, axis=1))
        rescale = tl.exp2(teacher_highest - higher)
        powers = tl.exp2(t - higher[:, None])
        teacher_total = teacher_total * rescale + tl.sum(powers, axis=1)
        teacher_highest = higher
        r = _relation(
            student_ptr, offs_n * stride_n, mask_n, offs_m * stride_n, mask_m, stride_e,
            scale, E, FLOAT32_PRODUCTS, BLOCK, BLOCK_E,
        )  # fmt: skip
        expected = expected * rescale + tl.sum(powers * r, axis=1)
        r = tl.where(mask_m[None, :], r, -float("inf"))
        higher = tl.maximum(highest, tl.max(r, axis=1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(r - higher[:, None]), axis=1)
        highest = higher
    log2_sum = highest + tl.log2(total)
    tl.store(log2_student_ptr + sample * N + offs_n, log2_sum, mask=mask_n)
    if s == 0:
        at = (b * G + g) * N + offs_n
        tl.store(log2_teacher_ptr + at, teacher_highest + tl.log2(teacher_total), mask=mask_n)
    # As a row of a matrix: Triton 3.6 cannot sum a vector that comes from Blackwell's tensor memory.
    loss = tl.sum(tl.where(mask_n, log2_sum - expected / teacher_total, 0.0)[None, :])
    weight = tl.load(weight_ptr + s * B + b)
    loss = tl.where(weight == 0, 0.0, loss * weight * (LN2 / (N * G)))
    tl.store(loss_ptr + sample * tl.num_programs(0) + tl.program_id(0), loss)


@triton.jit
def _pull_kernel(
    student_ptr,  # as above
    teacher_ptr,
    weight_ptr,
    log2_student_ptr,
    log2_teacher_ptr,
    grad_ptr,  # scalar, the loss's gradient
    gradient_ptr,  # out: [S, B, G, N, E]
    stride_s,
    stride_b,
    stride_g,
    stride_n,
    stride_e,
    teacher_stride_b,
    teacher_stride_g,
    teacher_stride_n,
    teacher_stride_e,
    B,
    G,
    scale,
    teacher_scale,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    FLOAT32_PRODUCTS: tl.constexpr,
    PULLED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """PULLED channels of the gradient of BLOCK rows: relations again, from the sums of both their rows."""
    sample = tl.program_id(1).to(tl.int64)
    s, b, g = sample // (B * G), sample // G % B, sample % G
    student_ptr += s * stride_s + b * stride_b + g * stride_g
    teacher_ptr += b * teacher_stride_b + g * teacher_stride_g
    log2_student_ptr += sample * N
    log2_teacher_ptr += (b * G + g) * N
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    log2_n = tl.load(log2_student_ptr + offs_n, mask=mask_n, other=0.0)
    teacher_log2_n = tl.load(log2_teacher_ptr + offs_n, mask=mask_n, other=0.0)
    offs_p = tl.program_id(2) * PULLED + tl.arange(0, PULLED)
    mask_p = offs_p < E
    pulled = tl.zeros((BLOCK, PULLED), tl.float32)
    for start in range(0, N, BLOCK):
        offs_m = start + tl.arange(0, BLOCK)
        mask_m = offs_m < N
        t = _relation(
            teacher_ptr, offs_n * teacher_stride_n, mask_n, offs_m * teacher_stride_n, mask_m, teacher_stride_e,
            teacher_scale, F, FLOAT32_PRODUCTS, BLOCK, BLOCK_E,
        )  # fmt: skip
        log2_m = tl.load(log2_teacher_ptr + offs_m, mask=mask_m, other=0.0)
        wanted = tl.exp2(t - teacher_log2_n[:, None]) + tl.exp2(t - log2_m[None, :])
        r = _relation(
            student_ptr, offs_n * stride_n, mask_n, offs_m * stride_n, mask_m, stride_e,
            scale, E, FLOAT32_PRODUCTS, BLOCK, BLOCK_E,
        )  # fmt: skip
        log2_m = tl.load(log2_student_ptr + offs_m, mask=mask_m, other=0.0)
        difference = tl.exp2(r - log2_n[:, None]) + tl.exp2(r - log2_m[None, :]) - wanted
        difference = tl.where(mask_m[None, :], difference * UNIT, 0.0)
        rows = offs_m * stride_n
        features = tl.load(
            student_ptr + (rows[:, None] + (offs_p * stride_e)[None, :]),
            mask=mask_m[:, None] & mask_p[None, :],
            other=0.0,
        )
        if not FLOAT32_PRODUCTS:
            difference = difference.to(features.dtype)
        pulled = _dot(difference, features, pulled, FLOAT32_PRODUCTS)
    weight = tl.load(weight_ptr + s * B + b)
    factor = tl.load(grad_ptr) * weight * (scale * LN2 / (N * G)) / UNIT
    pulled = tl.where(weight == 0, 0.0, pulled * factor).to(gradient_ptr.dtype.element_ty)
    at = (sample * N + offs_n[:, None]) * E + offs_p[None, :]
    tl.store(gradient_ptr + at, pulled, mask=mask_n[:, None] & mask_p[None, :])


KEY = ["N", "E", "F"]
_score = autotune(CONFIGS, key=KEY)(_score_kernel)
_float32_score = autotune(FLOAT32_CONFIGS, key=KEY)(_score_kernel)
_pull = autotune(PULL_CONFIGS, key=KEY)(_pull_kernel)
_float32_pull = autotune(FLOAT32_PULL_CONFIGS, key=KEY)(_pull_kernel)


def _near(x: Tensor) -> Tensor:
    """The same features, copied if one image and head spans more than 32 bits count."""
    (rows, width), strides = x.shape[-2:], x.stride()[-2:]
    return x if rows * strides[0] + width * strides[1] < 2**31 else x.contiguous()


def _common(raw: tuple) -> tuple[tuple, dict]:
    """What both kernels take after their tensors."""
    student, teacher, student_scale, teacher_scale, *_ = raw
    _, B, G, N, E = student.shape
    scales = student_scale * LOG2E, teacher_scale * LOG2E
    exact = student.dtype == torch.float32 or hardware.triton_interpreted()
    sizes = {"N": N, "E": E, "F": teacher.shape[-1], "FLOAT32_PRODUCTS": exact}
    return (*student.stride(), *teacher.stride(), B, G, *scales), sizes


def self_relation_fwd(*raw) -> tuple[Tensor, Tensor, Tensor]:
    """Raw arguments as `patchlight::self_relation_fwd`: the loss, and log2 of the student's and the teacher's sums."""
    student, teacher, *others = raw
    raw = _near(student), _near(teacher), *others
    student, teacher, _, _, weight, _ = raw
    S, B, G, N, _ = student.shape
    rest, sizes = _common(raw)
    kernel, configs = (_float32_score, FLOAT32_CONFIGS) if student.dtype == torch.float32 else (_score, CONFIGS)
    smallest = min(config.kwargs["BLOCK"] for config in configs)
    log2_student, log2_teacher = weight.new_empty(S, B, G, N), weight.new_empty(B, G, N)
    loss = weight.new_zeros(S * B * G * triton.cdiv(N, smallest))  # larger blocks fill less of it
    kernel[lambda meta: (triton.cdiv(N, meta["BLOCK"]), S * B * G)](
        student, teacher, weight, log2_student, log2_teacher, loss, *rest, **sizes
    )
    return loss.sum(), log2_student, log2_teacher


def self_relation_bwd(
    dtype: torch.dtype, grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *raw
) -> Tensor:
    """The gradient of the student's features in `dtype`."""
    student, teacher, *others = raw
    raw = _near(student), _near(teacher), *others
    student, teacher, _, _, weight, _ = raw
    S, B, G, N, E = student.shape
    rest, sizes = _common(raw)
    float32 = student.dtype == torch.float32
    pulled = min(PULLED_FLOAT32 if float32 else PULLED, max(16, triton.next_power_of_2(E)))
    out = torch.float32 if hardware.triton_interpreted() else dtype  # the interpreter cuts bf16 off unrounded
    gradient = student.new_empty(student.shape, dtype=out)
    (_float32_pull if float32 else _pull)[
        lambda meta: (triton.cdiv(N, meta["BLOCK"]), S * B * G, triton.cdiv(E, pulled))
    ](
        student, teacher, weight, log2_student, log2_teacher, grad_loss.to(weight.dtype), gradient, *rest, **sizes,
        PULLED=pulled,
    )  # fmt: skip
    return gradient.to(dtype)
