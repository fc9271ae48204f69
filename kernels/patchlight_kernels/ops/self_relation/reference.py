"""The specification of self_relation in plain PyTorch: any device, fp64 in fp64, everything else in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**14  # gradients of relations lie in [-2, 2]; stored in units that use the whole range of fp16


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def rounded(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """As the product with the features gets it: in the 16 bits of those, if they have 16."""
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
    """Raw arguments as `patchlight::self_relation_fwd`: loss, log2 of the softmax sums, the gradient if wanted."""
    dtype = student_SBGNE.dtype
    student, teacher, weight = (x.to(exact_dtype(dtype)) for x in (student_SBGNE, teacher_BGNF, weight_SB))
    student_relation = student_scale * (student @ student.mT)
    teacher_relation = teacher_scale * (teacher @ teacher.mT)
    wanted, log_q = teacher_relation.softmax(-1), student_relation.log_softmax(-1)
    rows = max(1, student.shape[2] * student.shape[3])
    cross_entropy = -(wanted * log_q).sum((-1, -2, -3)) / rows
    counts = weight != 0  # NaN in a sample of weight 0 is nobody's business
    loss = torch.where(counts, weight * cross_entropy, 0.0).sum()
    log2_sums = (relation.logsumexp(-1) / math.log(2) for relation in (student_relation, teacher_relation))
    if not gradients:
        return loss, *log2_sums, loss.new_empty(0)
    difference = log_q.exp() - wanted
    pull = rounded(difference + difference.mT, dtype) @ student
    of_sample = (student_scale / rows * weight)[:, :, None, None, None]
    return loss, *log2_sums, torch.where(counts[:, :, None, None, None], of_sample * pull, 0.0)


def self_relation_bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *raw) -> Tensor:
    """The gradient of a forward that made none, in the dtype of the student; the specification has no use for the sums."""
    return (grad_loss * self_relation_fwd(*raw[:-1], True)[3]).to(raw[0].dtype)
