"""Triton kernels of self_relation: one pass over the rows for the loss, one for the gradient; relations stay in registers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import hardware
from ...arguments import with_near_rows
from ...triton_functions import LN2, LOWEST, dot
from ...tuning import autotune
from . import reference

LOG2E = 1 / math.log(2)
UNIT = tl.constexpr(reference.UNIT)
CHANNELS = 256  # of the gradient that a program holds
FLOAT32_CHANNELS = 64


@triton.jit
def _relation(features, offs_n, mask_n, offs_m, mask_m, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows offs_n of the features (pointer, row stride, channel stride, scale) against rows offs_m, in units of log2."""
    ptr, stride_n, stride_e, scale = features
    rows_n, rows_m = offs_n * stride_n, offs_m * stride_n
    dots = tl.zeros((offs_n.shape[0], offs_m.shape[0]), tl.float32)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        in_e, mask_e = offs_e * stride_e, offs_e < E
        x = tl.load(ptr + (rows_n[:, None] + in_e[None, :]), mask=mask_n[:, None] & mask_e[None, :], other=0.0)
        y = tl.load(ptr + (rows_m[None, :] + in_e[:, None]), mask=mask_m[None, :] & mask_e[:, None], other=0.0)
        dots = dot(x, y, dots)
    return dots * scale


@triton.jit
def _block(student_ptr, teacher_ptr, strides, teacher_strides, B, G, N: tl.constexpr, BLOCK: tl.constexpr):
    """The program's block of rows and its sample; the sample's view, image and head; where its features of student and teacher
    begin. All blocks of all samples are along x, as y has room for 65535 only.
    """
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    block, sample = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    s, b, g = sample // (B * G), sample // G % B, sample % G
    student_ptr += s * strides[0] + b * strides[1] + g * strides[2]
    teacher_ptr += b * teacher_strides[0] + g * teacher_strides[1]
    return block, sample, s, b, g, student_ptr, teacher_ptr


CONFIGS = [
    triton.Config({"BLOCK": 64, "BLOCK_E": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 64, "BLOCK_E": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK": 64, "BLOCK_E": 32}, num_warps=4, num_stages=3),
]
# fp32 products do not use tensor cores and keep their operands in registers, so steps are short.
FLOAT32_CONFIGS = [
    triton.Config({"BLOCK": 32, "BLOCK_E": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 64, "BLOCK_E": 16}, num_warps=8, num_stages=2),
]
GRADIENT_CONFIGS = [
    triton.Config({"BLOCK": 64, "BLOCK_E": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK": 64, "BLOCK_E": 32}, num_warps=8, num_stages=3),
]
FLOAT32_GRADIENT_CONFIGS = [triton.Config({"BLOCK": 32, "BLOCK_E": 16}, num_warps=8, num_stages=2)]


@triton.jit
def _loss_kernel(
    student_ptr,  # [S, B, G, N, E], any strides
    teacher_ptr,  # [B, G, N, F], any strides
    weight_ptr,  # [S, B]
    log2_student_ptr,  # out: [S, B, G, N] log2 of the sum of powers
    log2_teacher_ptr,  # out: [B, G, N]
    loss_ptr,  # out: [S, B, G, blocks of rows]
    strides,
    teacher_strides,
    B,
    G,
    scale,
    teacher_scale,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK rows of one view, image and head against all rows: both softmax sums, and the cross-entropy."""
    block, sample, s, b, g, student_ptr, teacher_ptr = _block(
        student_ptr, teacher_ptr, strides, teacher_strides, B, G, N, BLOCK
    )
    student = student_ptr, strides[3], strides[4], scale
    teacher = teacher_ptr, teacher_strides[2], teacher_strides[3], teacher_scale
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    teacher_highest = tl.full((BLOCK,), LOWEST, tl.float32)
    teacher_total = tl.zeros((BLOCK,), tl.float32)
    expected = tl.zeros((BLOCK,), tl.float32)  # the student's relations weighed by the teacher's powers
    for start in range(0, N, BLOCK):
        offs_m = start + tl.arange(0, BLOCK)
        mask_m = offs_m < N
        t = _relation(teacher, offs_n, mask_n, offs_m, mask_m, F, BLOCK_E)
        t = tl.where(mask_m[None, :], t, -float("inf"))
        higher = tl.maximum(teacher_highest, tl.max(t, axis=1))
        rescale = tl.exp2(teacher_highest - higher)
        powers = tl.exp2(t - higher[:, None])
        teacher_total = teacher_total * rescale + tl.sum(powers, axis=1)
        teacher_highest = higher
        r = _relation(student, offs_n, mask_n, offs_m, mask_m, E, BLOCK_E)
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
    tl.store(loss_ptr + tl.program_id(0), loss)


@triton.jit
def _gradient_kernel(
    student_ptr,  # as above
    teacher_ptr,
    weight_ptr,
    log2_student_ptr,
    log2_teacher_ptr,
    grad_ptr,  # scalar, the loss's gradient
    gradient_ptr,  # out: [S, B, G, N, E]
    strides,
    teacher_strides,
    B,
    G,
    scale,
    teacher_scale,
    N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """CHANNELS channels of the gradient of BLOCK rows: relations again, from the sums of both their rows."""
    block, sample, s, b, g, student_ptr, teacher_ptr = _block(
        student_ptr, teacher_ptr, strides, teacher_strides, B, G, N, BLOCK
    )
    student = student_ptr, strides[3], strides[4], scale
    teacher = teacher_ptr, teacher_strides[2], teacher_strides[3], teacher_scale
    log2_student_ptr += sample * N
    log2_teacher_ptr += (b * G + g) * N
    offs_n = block * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    log2_n = tl.load(log2_student_ptr + offs_n, mask=mask_n, other=0.0)
    teacher_log2_n = tl.load(log2_teacher_ptr + offs_n, mask=mask_n, other=0.0)
    offs_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask_c = offs_c < E
    gradient = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for start in range(0, N, BLOCK):
        offs_m = start + tl.arange(0, BLOCK)
        mask_m = offs_m < N
        t = _relation(teacher, offs_n, mask_n, offs_m, mask_m, F, BLOCK_E)
        log2_m = tl.load(log2_teacher_ptr + offs_m, mask=mask_m, other=0.0)
        target = tl.exp2(t - teacher_log2_n[:, None]) + tl.exp2(t - log2_m[None, :])
        r = _relation(student, offs_n, mask_n, offs_m, mask_m, E, BLOCK_E)
        log2_m = tl.load(log2_student_ptr + offs_m, mask=mask_m, other=0.0)
        difference = tl.exp2(r - log2_n[:, None]) + tl.exp2(r - log2_m[None, :]) - target
        difference = tl.where(mask_m[None, :], difference * UNIT, 0.0)
        rows = offs_m * strides[3]
        features = tl.load(
            student_ptr + (rows[:, None] + (offs_c * strides[4])[None, :]),
            mask=mask_m[:, None] & mask_c[None, :],
            other=0.0,
        )
        gradient = dot(difference, features, gradient)
    weight = tl.load(weight_ptr + s * B + b)
    factor = tl.load(grad_ptr) * weight * (scale * LN2 / (N * G)) / UNIT
    gradient = tl.where(weight == 0, 0.0, gradient * factor).to(gradient_ptr.dtype.element_ty)
    at = (sample * N + offs_n[:, None]) * E + offs_c[None, :]
    tl.store(gradient_ptr + at, gradient, mask=mask_n[:, None] & mask_c[None, :])


KEY = ["N", "E", "F"]
_loss = autotune(CONFIGS, key=KEY)(_loss_kernel)
_float32_loss = autotune(FLOAT32_CONFIGS, key=KEY)(_loss_kernel)
_gradient = autotune(GRADIENT_CONFIGS, key=KEY)(_gradient_kernel)
_float32_gradient = autotune(FLOAT32_GRADIENT_CONFIGS, key=KEY)(_gradient_kernel)


def _arguments(student: Tensor, teacher: Tensor, student_scale: float, teacher_scale: float) -> tuple[tuple, dict]:
    """What both kernels take after their tensors."""
    _, B, G, N, E = student.shape
    scales = student_scale * LOG2E, teacher_scale * LOG2E
    return (student.stride(), teacher.stride(), B, G, *scales), {"N": N, "E": E, "F": teacher.shape[-1]}


def self_relation_fwd(*raw) -> tuple[Tensor, Tensor, Tensor]:
    """Raw arguments as `patchlight::self_relation_fwd`: the loss, and log2 of the student's and the teacher's sums."""
    student, teacher, *scales, weight, _ = raw
    student, teacher = with_near_rows(student), with_near_rows(teacher)
    S, B, G, N, _ = student.shape
    rest, sizes = _arguments(student, teacher, *scales)
    kernel, configs = (_float32_loss, FLOAT32_CONFIGS) if student.dtype == torch.float32 else (_loss, CONFIGS)
    smallest = min(config.kwargs["BLOCK"] for config in configs)
    log2_student, log2_teacher = weight.new_empty(S, B, G, N), weight.new_empty(B, G, N)
    loss = weight.new_zeros(S * B * G * triton.cdiv(N, smallest))  # larger blocks fill less of it
    kernel[lambda sizes: (S * B * G * triton.cdiv(N, sizes["BLOCK"]),)](
        student, teacher, weight, log2_student, log2_teacher, loss, *rest, **sizes
    )
    return loss.sum(), log2_student, log2_teacher


def self_relation_bwd(
    dtype: torch.dtype, grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *raw
) -> Tensor:
    """The gradient of the student's features in `dtype`."""
    student, teacher, *scales, weight, _ = raw
    student, teacher = with_near_rows(student), with_near_rows(teacher)
    S, B, G, N, E = student.shape
    rest, sizes = _arguments(student, teacher, *scales)
    float32 = student.dtype == torch.float32
    channels = min(FLOAT32_CHANNELS if float32 else CHANNELS, max(16, triton.next_power_of_2(E)))
    out = torch.float32 if hardware.triton_interpreted() else dtype  # the interpreter cuts bf16 off unrounded
    gradient = student.new_empty(student.shape, dtype=out)
    kernel = _float32_gradient if float32 else _gradient
    kernel[lambda sizes: (S * B * G * triton.cdiv(N, sizes["BLOCK"]), triton.cdiv(E, channels))](
        student, teacher, weight, log2_student, log2_teacher, grad_loss.to(weight.dtype), gradient, *rest, **sizes,
        CHANNELS=channels,
    )  # fmt: skip
    return gradient.to(dtype)
