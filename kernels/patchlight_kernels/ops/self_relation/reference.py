"""The specification of self_relation in plain PyTorch: any device, fp64 in fp64, everything else in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...arguments import accumulator

UNIT = 2.0**14  # gradients of relations lie in [-2, 2]; stored in units that use the whole range of fp16


def rounded(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the dtype of the features if that has 16 bits, for the product with them."""
    if dtype.itemsize > 2:
        return gradient
    return (gradient * UNIT).to(dtype).to(gradient.dtype) / UNIT


def self_relation_fwd(
    student_SBGNE: Tensor,
    teacher_BGNF: Tensor,
    student_scale: float,
    teacher_scale: float,
    weight_SB: Tensor,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes the arguments of `patchlight::self_relation_fwd`: loss, log2 of the softmax sums, the gradient if wanted."""
    dtype = student_SBGNE.dtype
    student, teacher, weight = (x.to(accumulator(dtype)) for x in (student_SBGNE, teacher_BGNF, weight_SB))
    student_relation = student_scale * (student @ student.mT)
    teacher_relation = teacher_scale * (teacher @ teacher.mT)
    target, log_q = teacher_relation.softmax(-1), student_relation.log_softmax(-1)
    rows = max(1, student.shape[2] * student.shape[3])
    cross_entropy = -(target * log_q).sum((-1, -2, -3)) / rows
    counts = weight != 0  # a sample of weight 0 changes nothing, even if it holds NaN
    loss = torch.where(counts, weight * cross_entropy, 0.0).sum()
    log2_student, log2_teacher = (x.logsumexp(-1) / math.log(2) for x in (student_relation, teacher_relation))
    if not gradients:
        return loss, log2_student, log2_teacher, loss.new_empty(0)
    difference = log_q.exp() - target
    product = rounded(difference + difference.mT, dtype) @ student
    factor = (student_scale / rows * weight)[:, :, None, None, None]
    dstudent = torch.where(counts[:, :, None, None, None], factor * product, 0.0)
    return loss, log2_student, log2_teacher, dstudent


def self_relation_bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *args) -> Tensor:
    """The gradient after a forward that made none, in the dtype of the student. The sums are for other implementations."""
    student, teacher, student_scale, teacher_scale, weight, _ = args
    dstudent = self_relation_fwd(student, teacher, student_scale, teacher_scale, weight, gradients=True)[3]
    return (grad_loss * dstudent).to(student.dtype)
