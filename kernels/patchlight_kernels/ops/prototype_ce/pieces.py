"""The backward on a GPU: a kernel makes the gradient of the logits piece by piece, cuBLAS its two products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...arguments import accumulator
from .reference import unit as unit_of

PIECE = 1 << 24  # gradients of logits in memory at a time: 32 MiB in 16 bits, which the L2 cache of a large GPU holds
ALIGNED = 128  # pieces start on whole tiles


def gradients(
    grad_logits: Callable[..., Tensor],
    grad_loss: Tensor,
    log2_student: Tensor,
    log2_teacher: Tensor,
    args: tuple,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dz and dprototypes in `dtype`.

    `grad_logits(args, log2_student, log2_teacher, unit)` takes a piece as a problem with fewer rows and prototypes, and
    gives [S, rows, prototypes] in the dtype of z:
    unit row_weight sum_t pair_weight[t] (p_student - p_teacher[t]).
    """
    z, prototypes, _, _, temperature, _, pair_weight, row_weight, *_ = args
    unit = unit_of(pair_weight, row_weight)
    factor = grad_loss / unit / temperature
    (views, rows, width), count = z.shape, len(prototypes)
    row_step, prototype_step = steps(views, rows, count)
    wide = accumulator(dtype)
    dz = z.new_empty(z.shape, dtype=dtype if prototype_step == count else wide)
    dprototypes = z.new_empty(prototypes.shape, dtype=dtype if row_step == rows else wide)
    for r in slices(rows, row_step):
        for k in slices(count, prototype_step):
            sums = log2_student[:, r].contiguous(), log2_teacher[:, r].contiguous()
            g = grad_logits(_piece(args, r, k), *sums, unit).flatten(0, 1)
            _add(dz[:, r], _product(g, prototypes[k]).view(views, -1, width), factor, first=k.start == 0)
            _add(dprototypes[k], _product(g.T, z[:, r].reshape(-1, width)), factor, first=r.start == 0)
    return dz.to(dtype), dprototypes.to(dtype)


def steps(views: int, rows: int, prototypes: int) -> tuple[int, int]:
    """Rows and prototypes of a piece. The longer side is cut, so that only the smaller gradient is summed over pieces."""
    if views * rows >= prototypes:
        return _even(rows, PIECE // (views * prototypes)), prototypes
    return rows, _even(prototypes, PIECE // (views * rows))


def _even(size: int, most: int) -> int:
    """The length of equal parts of at most `most`, or of ALIGNED if that is more."""
    parts = math.ceil(size / max(most, ALIGNED))
    return min(size, math.ceil(size / parts / ALIGNED) * ALIGNED)


def slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _piece(args: tuple, rows: slice, prototypes: slice) -> tuple:
    """The arguments of the problem with these rows and prototypes only."""
    z, w, teacher_z, teacher_w, *temperatures, pair_weight, row_weight, bias, gradients = args
    parts = z[:, rows], w[prototypes], teacher_z[:, rows], teacher_w[prototypes]
    bias = None if bias is None else bias[prototypes]
    return (*parts, *temperatures, pair_weight, row_weight[rows], bias, gradients)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In fp32, also of 16-bit factors; only a GPU multiplies those without a copy."""
    return a.float() @ b.float() if a.device.type == "cpu" else torch.mm(a, b, out_dtype=torch.float32)


def _add(total: Tensor, part: Tensor, factor: Tensor, first: bool) -> None:
    """Adds `factor` times the part; the first one is written without reading the total."""
    part.mul_(factor)
    if first:
        total.copy_(part)
    else:
        total.add_(part)
