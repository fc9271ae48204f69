"""Relations between channels over a whole batch, as Barlow Twins has them: the comparison in SERE's Table 11."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranks import mean_over_batch

NORM_EPS = 1e-5  # of the BatchNorm by which channels are standardized
OFF_DIAGONAL = 5e-3  # lambda


def standardize(x_VBD: Tensor) -> Tensor:
    """Each channel of each view with mean 0 and variance 1 over the images of all ranks."""
    images = x_VBD.shape[1]
    centered = x_VBD - mean_over_batch(x_VBD.sum(dim=1, keepdim=True), images)
    variance = mean_over_batch(centered.square().sum(dim=1, keepdim=True), images)
    return centered * (variance + NORM_EPS).rsqrt()


def batch_relation_loss(student_SBD: Tensor, teacher_TBD: Tensor, pair_weight_TS: Tensor) -> Tensor:
    """The sum over pairs of views of weight * (sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2).

    C [D, D] is the correlation, over the images of all ranks, of the student's channel i with the teacher's channel j. In fp32
    or better, also under autocast.
    """
    exact = torch.promote_types(student_SBD.dtype, torch.float32)
    with torch.autocast(student_SBD.device.type, enabled=False):
        student, teacher = standardize(student_SBD.to(exact)), standardize(teacher_TBD.to(exact))
        products = student.mT.unsqueeze(0) @ teacher.unsqueeze(1)  # [T, S, D, D]
        correlation = mean_over_batch(products, student.shape[1])
        own = correlation.diagonal(dim1=-2, dim2=-1)
        others = correlation.square().sum(dim=(-2, -1)) - own.square().sum(dim=-1)
        loss_TS = (1 - own).square().sum(dim=-1) + OFF_DIAGONAL * others
        return (loss_TS * pair_weight_TS).sum()
