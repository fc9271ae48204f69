"""The specification of prototype_ce in plain PyTorch: any device, fp64 in fp64, everything else in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arguments import accumulator
from . import factors

CHUNK_LOGITS = 1 << 26  # logits in memory at a time, 256 MiB in fp32: rows are computed in chunks of so many


@dataclass(frozen=True, slots=True)
class Chunk:
    """Results for the rows `rows` of every view."""

    rows: slice
    log2_student: Tensor  # [S, rows] log2 of the sum of exponentials
    log2_teacher: Tensor  # [T, rows]
    loss: Tensor  # scalar, the share of these rows
    grad_logits: Tensor | None  # [S, rows, K] of that loss with respect to z prototypes^T, if wanted


def chunks(
    dtype: torch.dtype,
    z_SRD: Tensor,
    prototypes_KD: Tensor,
    teacher_z_TRD: Tensor,
    teacher_prototypes_KD: Tensor,
    temperature: float,
    teacher_temperature: float,
    teacher_divisor: Tensor | None,
    pair_weight_TS: Tensor,
    row_weight_R: Tensor,
    bias_K: Tensor | None,
    products: str,
    gradients: bool,
) -> Iterator[Chunk]:
    """The whole formula, for as many rows at a time as CHUNK_LOGITS allows; `dtype` is that of the public arguments."""
    if pair_weight_TS.numel() == 0:
        return  # no pairs, no loss
    of_teacher = teacher_temperature if teacher_divisor is None else teacher_temperature * teacher_divisor
    views = len(z_SRD) + len(teacher_z_TRD)
    size = max(1, CHUNK_LOGITS // max(1, views * len(prototypes_KD)))
    for first in range(0, z_SRD.shape[1], size):
        rows = slice(first, first + size)
        teacher_logits = teacher_z_TRD[:, rows] @ teacher_prototypes_KD.T
        if bias_K is not None:
            teacher_logits = teacher_logits + bias_K
        teacher_logits = teacher_logits / of_teacher
        logits = z_SRD[:, rows] @ prototypes_KD.T / temperature
        target = torch.einsum("ts,trk->srk", pair_weight_TS, teacher_logits.softmax(-1))
        log_p = logits.log_softmax(-1)
        loss = -((target * log_p).sum(-1) * row_weight_R[rows]).sum()
        grad_logits = None
        if gradients:
            pairs = pair_weight_TS.sum(0)[:, None, None]
            grad_logits = (pairs * log_p.exp() - target) * row_weight_R[rows, None]
            if products != "fp32" or dtype.itemsize == 2:
                grad_logits = rounded(grad_logits, dtype, products, unit(pair_weight_TS, row_weight_R))
            grad_logits = grad_logits / temperature
        log2_student, log2_teacher = (x.logsumexp(-1) / math.log(2) for x in (logits, teacher_logits))
        yield Chunk(rows, log2_student, log2_teacher, loss, grad_logits)


def unit(pair_weight_TS: Tensor, row_weight_R: Tensor) -> Tensor:
    """The power of two that brings the largest gradient a logit can have (times the temperature) below 2^15, fp32."""
    pairs, rows = torch.linalg.vector_norm(pair_weight_TS, 1, dim=0), torch.linalg.vector_norm(row_weight_R, math.inf)
    return factors.TOP / factors.power_of_two(pairs.amax() * rows)


def rounded(grad_logits: Tensor, dtype: torch.dtype, products: str, unit: Tensor) -> Tensor:
    """As the factor of its two products: in 16 bits, as the backward of a linear layer under autocast, or in two such parts."""
    scaled = grad_logits * unit
    if products == "fp16x3":
        first, second = factors.split(scaled, factors.LIFT)
        return (first.float() + second.float() / factors.LIFT) / unit
    return scaled.to(torch.float16 if products == "fp16" else dtype).to(grad_logits.dtype) / unit


def prototype_ce_fwd(*args) -> tuple[Tensor, ...]:
    """Takes the arguments of `patchlight::prototype_ce_fwd`: loss, log2 of the softmax sums, gradients if wanted."""
    dtype, (scales, products, gradients) = args[0].dtype, args[-3:]
    if scales is not None:
        args = *(factors.values(x, scale, products) for x, scale in zip(args[:4], scales, strict=True)), *args[4:]
    args = *args[:-3], products, gradients
    wide: list[Any] = [value.to(accumulator(dtype)) if isinstance(value, Tensor) else value for value in args]
    z, prototypes, teacher_z = wide[:3]
    loss = z.new_zeros(())
    log2_student, log2_teacher = z.new_zeros(z.shape[:2]), z.new_zeros(teacher_z.shape[:2])
    dz, dprototypes = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (z, prototypes))
    for chunk in chunks(dtype, *wide):
        loss += chunk.loss
        log2_student[:, chunk.rows], log2_teacher[:, chunk.rows] = chunk.log2_student, chunk.log2_teacher
        if chunk.grad_logits is not None:
            dz[:, chunk.rows] = chunk.grad_logits @ prototypes
            dprototypes += chunk.grad_logits.flatten(0, 1).T @ z[:, chunk.rows].flatten(0, 1)
    if not gradients:
        dz, dprototypes = z.new_empty(0), z.new_empty(0)
    return loss, log2_student, log2_teacher, dz, dprototypes, z.new_ones(2 if gradients else 0)


def prototype_ce_bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Gradients after a forward that made none, in the dtype of z. The sums are for other implementations."""
    dz, dprototypes = prototype_ce_fwd(*args[:-1], True)[3:5]
    return (grad_loss * dz).to(args[0].dtype), (grad_loss * dprototypes).to(args[1].dtype)
