"""The specification of prototype_ce in plain PyTorch: any device, fp64 in fp64, everything else in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arguments import accumulator

CHUNK_LOGITS = 1 << 26  # logits in memory at a time, 256 MiB in fp32: rows are computed in chunks of so many
LARGEST = 2.0**15  # gradients of logits are stored in units that keep them below this: fp16 ends at 2^16


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
    pair_weight_TS: Tensor,
    row_weight_R: Tensor,
    bias_K: Tensor | None,
    gradients: bool,
) -> Iterator[Chunk]:
    """The whole formula, for as many rows at a time as CHUNK_LOGITS allows; `dtype` is that of the public arguments."""
    if pair_weight_TS.numel() == 0:
        return  # no pairs, no loss
    views = len(z_SRD) + len(teacher_z_TRD)
    size = max(1, CHUNK_LOGITS // max(1, views * len(prototypes_KD)))
    for first in range(0, z_SRD.shape[1], size):
        rows = slice(first, first + size)
        teacher_logits = teacher_z_TRD[:, rows] @ teacher_prototypes_KD.T
        if bias_K is not None:
            teacher_logits = teacher_logits + bias_K
        teacher_logits = teacher_logits / teacher_temperature
        logits = z_SRD[:, rows] @ prototypes_KD.T / temperature
        target = torch.einsum("ts,trk->srk", pair_weight_TS, teacher_logits.softmax(-1))
        log_p = logits.log_softmax(-1)
        loss = -((target * log_p).sum(-1) * row_weight_R[rows]).sum()
        grad_logits = None
        if gradients:
            pairs = pair_weight_TS.sum(0)[:, None, None]
            grad_logits = (pairs * log_p.exp() - target) * row_weight_R[rows, None]
            grad_logits = rounded(grad_logits, dtype, unit(pair_weight_TS, row_weight_R)) / temperature
        log2_student, log2_teacher = (x.logsumexp(-1) / math.log(2) for x in (logits, teacher_logits))
        yield Chunk(rows, log2_student, log2_teacher, loss, grad_logits)


def unit(pair_weight_TS: Tensor, row_weight_R: Tensor) -> Tensor:
    """The power of two that brings the largest gradient a logit can have (times the temperature) near LARGEST."""
    largest = pair_weight_TS.abs().sum(0).max() * row_weight_R.abs().max()
    return torch.where(largest == 0, 1.0, torch.exp2((math.log2(LARGEST) - largest.log2()).floor()))


def rounded(grad_logits: Tensor, dtype: torch.dtype, unit: Tensor) -> Tensor:
    """Rounded to the dtype of the rows if that has 16 bits, as the backward of a linear layer under autocast rounds it."""
    if dtype.itemsize > 2:
        return grad_logits
    return (grad_logits * unit).to(dtype).to(grad_logits.dtype) / unit


def prototype_ce_fwd(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Takes the arguments of `patchlight::prototype_ce_fwd`: loss, log2 of the softmax sums, gradients if wanted."""
    dtype = args[0].dtype
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
    if not args[-1]:
        dz, dprototypes = z.new_empty(0), z.new_empty(0)
    return loss, log2_student, log2_teacher, dz, dprototypes


def prototype_ce_bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Gradients after a forward that made none, in the dtype of z. The sums are for other implementations."""
    dz, dprototypes = prototype_ce_fwd(*args[:-1], True)[3:]
    return (grad_loss * dz).to(args[0].dtype), (grad_loss * dprototypes).to(args[1].dtype)
