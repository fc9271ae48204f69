"""The specification of prototype_ce in plain PyTorch: any device, fp64 in fp64, everything else in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 26  # logits held at once, 256 MiB in fp32: beyond that rows are computed in chunks
LARGEST = 2.0**15  # gradients of logits are stored in units that keep them below this: fp16 ends at 2^16


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is known of the rows `rows` of every view."""

    rows: slice
    log2_student: Tensor  # [S, rows] log2 of the sum of exponentials
    log2_teacher: Tensor  # [T, rows]
    loss: Tensor  # scalar, these rows' part
    grad_logits: Tensor | None  # [S, rows, K] of that loss with respect to z W^T


def chunks(
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
    dtype: torch.dtype,
    chunk_logits: int | None = None,
) -> Iterator[Chunk]:
    """The whole mathematics, for as many rows at a time as `chunk_logits` allows; `dtype` is that of the rows as given."""
    if pair_weight_TS.numel() == 0:
        return  # no pairs, no loss
    views = len(z_SRD) + len(teacher_z_TRD)
    size = max(1, (chunk_logits or CHUNK_LOGITS) // max(1, views * len(prototypes_KD)))
    for first in range(0, z_SRD.shape[1], size):
        rows = slice(first, first + size)
        teacher_logits = teacher_z_TRD[:, rows] @ teacher_prototypes_KD.T
        if bias_K is not None:
            teacher_logits = teacher_logits + bias_K
        teacher_logits = teacher_logits / teacher_temperature
        logits = z_SRD[:, rows] @ prototypes_KD.T / temperature
        wanted = torch.einsum("ts,trk->srk", pair_weight_TS, teacher_logits.softmax(-1))
        log_p = logits.log_softmax(-1)
        loss = -((wanted * log_p).sum(-1) * row_weight_R[rows]).sum()
        grad_logits = None
        if gradients:
            pairs = pair_weight_TS.sum(0)[:, None, None]
            grad_logits = (pairs * log_p.exp() - wanted) * row_weight_R[rows, None]
            grad_logits = rounded(grad_logits, dtype, unit(pair_weight_TS, row_weight_R)) / temperature
        log2_sums = [x.logsumexp(-1) / math.log(2) for x in (logits, teacher_logits)]
        yield Chunk(rows, *log2_sums, loss, grad_logits)


def unit(pair_weight_TS: Tensor, row_weight_R: Tensor) -> Tensor:
    """The power of two that brings the largest gradient a logit can have (times the temperature) near LARGEST."""
    largest = pair_weight_TS.abs().sum(0).max() * row_weight_R.abs().max()
    return torch.where(largest == 0, 1.0, torch.exp2((math.log2(LARGEST) - largest.log2()).floor()))


def rounded(grad_logits: Tensor, dtype: torch.dtype, unit: Tensor) -> Tensor:
    """As the backward of a linear layer under autocast gets it: in the 16 bits of the rows, if those have 16."""
    if dtype.itemsize > 2:
        return grad_logits
    return (grad_logits * unit).to(dtype).to(grad_logits.dtype) / unit


def _exact(raw: tuple) -> tuple:
    """Raw arguments with every tensor in the dtype that is computed in."""
    dtype = exact_dtype(raw[0].dtype)
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in raw)


def prototype_ce_fwd(*raw) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Raw arguments as `patchlight::prototype_ce_fwd`: loss, log2 of the softmax sums, gradients if wanted."""
    exact = _exact(raw)
    z, prototypes, teacher_z, *_, gradients = exact
    loss = z.new_zeros(())
    log2_student, log2_teacher = z.new_zeros(z.shape[:2]), z.new_zeros(teacher_z.shape[:2])
    dz, dprototypes = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (z, prototypes))
    for chunk in chunks(*exact, raw[0].dtype):
        loss += chunk.loss
        log2_student[:, chunk.rows], log2_teacher[:, chunk.rows] = chunk.log2_student, chunk.log2_teacher
        if gradients:
            dz[:, chunk.rows] = chunk.grad_logits @ prototypes
            dprototypes += chunk.grad_logits.flatten(0, 1).T @ z[:, chunk.rows].flatten(0, 1)
    return loss, log2_student, log2_teacher, *((dz, dprototypes) if gradients else (z.new_empty(0), z.new_empty(0)))


def prototype_ce_bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *raw) -> tuple[Tensor, Tensor]:
    """Gradients of a forward that made none, in the dtype of z; the specification has no use for the sums."""
    dz, dprototypes = prototype_ce_fwd(*raw[:-1], True)[3:]
    return (grad_loss * dz).to(raw[0].dtype), (grad_loss * dprototypes).to(raw[1].dtype)
