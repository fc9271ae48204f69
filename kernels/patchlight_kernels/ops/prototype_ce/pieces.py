"""How a GPU goes through a problem piece by piece: products by cuBLAS, everything between them by an implementation's kernels.

Two ways. "stream": kernels multiply and keep no dot product; only the gradients of the logits are written, a piece at a time.
"chunks": cuBLAS writes the dot products of a piece in fp32, and kernels read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...arguments import accumulator
from ...dispatch import Impl
from . import factors
from .reference import unit as unit_of

PIECE = 1 << 24  # gradients of logits in memory at a time: 32 MiB in 16 bits, which the L2 cache of a large GPU holds
CHUNK = 32 << 20  # bytes of dot products and gradients in memory at a time; by prediction, nobody has measured it
ALIGNED = 128  # pieces start on whole tiles
WHOLE_ROWS = (
    24 << 10
)  # values of a position's teacher rows and one student row that a block holds: 96 KiB of shared memory
FEW = 1 << 20  # logits below which launches cost more than products

WAY: str | None = None  # "stream" or "chunks" for every problem of fp16 factors: for benchmarks and tests


@dataclass(frozen=True, slots=True)
class Problem:
    """What kernels take. With `prototypes` None, `z` and `teacher_z` are dot products [views, rows, prototypes] in fp32."""

    z: Tensor
    prototypes: Tensor | None
    teacher_z: Tensor
    teacher_prototypes: Tensor | None
    temperature: float
    teacher_temperature: float
    teacher_divisor: Tensor | None  # 0-d fp64: the teacher's temperature is divided into this and the number above
    units: Tensor | None  # [2] fp32: what dot products of the student and of the teacher are to be multiplied by
    bias: Tensor | None
    pair_weight: Tensor
    row_weight: Tensor

    @property
    def device(self) -> torch.device:
        return self.z.device

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Student views, teacher views, rows, prototypes."""
        count = self.z.shape[2] if self.prototypes is None else len(self.prototypes)
        return len(self.z), len(self.teacher_z), self.z.shape[1], count

    def piece(self, rows: slice, prototypes: slice) -> Problem:
        """The problem with these rows and prototypes only."""
        assert self.prototypes is not None
        assert self.teacher_prototypes is not None
        return replace(
            self,
            z=self.z[:, rows],
            prototypes=self.prototypes[prototypes],
            teacher_z=self.teacher_z[:, rows],
            teacher_prototypes=self.teacher_prototypes[prototypes],
            bias=None if self.bias is None else self.bias[prototypes],
            row_weight=self.row_weight[rows],
        )

    def multiplied(self) -> Problem:
        """The same with dot products instead of factors."""
        z, teacher_z = _dots(self.z, self.prototypes), _dots(self.teacher_z, self.teacher_prototypes)
        return replace(self, z=z, prototypes=None, teacher_z=teacher_z, teacher_prototypes=None)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What an implementation brings; `dtype` is that of the gradients of logits, [S, rows, prototypes], which are in `unit`s.

    tiles(problem): for each 64 prototypes the log2 of both branches' sums and the student's mean logits under the teacher.
    merge(*tiles, pair_weight, row_weight): the loss, and the log2 of the sums over all prototypes.
    grad_logits(problem, log2_student, log2_teacher, unit, dtype).
    whole_rows(problem, unit, dtype or None, first, losses, log2_student, log2_teacher): all at once, from dot products with all
    prototypes; writes the rows from `first` on of the three [views, R] tensors and gives the gradients of the logits.
    """

    tiles: Callable[[Problem], tuple[Tensor, ...]]
    merge: Callable[..., tuple[Tensor, ...]]
    grad_logits: Callable[..., Tensor]
    whole_rows: Callable[..., Tensor | None]


def way(views: int, rows: int, prototypes: int, products: str) -> str:
    """The way for a problem of these sizes, by prediction until somebody has measured both (see the op's README)."""
    if products == "fp32":
        return "stream"  # also 16-bit rows, which are multiplied as they are
    few = views * rows * prototypes < FEW and products == "fp16"  # rows of "fp16x3" are three times as wide
    return WAY or ("stream" if few else "chunks")


def implementation(name: str, kernels: Kernels, unsupported: Callable[..., str | None]) -> Impl:
    """An implementation by these kernels."""

    def fwd(*args) -> tuple[Tensor, ...]:
        return Passes(kernels, args).forward(args[-1])

    def bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *args) -> tuple[Tensor, Tensor]:
        dtype = args[0].dtype
        sums = Passes(kernels, args).gradients(log2_student, log2_teacher, dtype)
        of_z, of_prototypes = (grad_loss * sums.scale).unbind()
        return _scaled(sums.dz, of_z, dtype), _scaled(sums.dprototypes, of_prototypes, dtype)

    return Impl(name, fwd, unsupported, bwd)


class Passes:
    """The passes over one problem."""

    def __init__(self, kernels: Kernels, args: tuple) -> None:
        z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, divisor, *weights, _ = args
        pair_weight, row_weight, bias, self.scales, self.products = weights
        self.kernels, self.width = kernels, factors.width(z, self.products)
        units = None if self.scales is None else self.scales.view(2, 2).prod(1)
        divisor = None if divisor is None else divisor.to(torch.float64)
        temperatures = temperature, teacher_temperature, divisor
        rows = z, prototypes, teacher_z, teacher_prototypes
        self.problem = Problem(*rows, *temperatures, units, bias, pair_weight, row_weight)
        views, _, length, count = self.problem.sizes
        self.way = way(views, length, count, self.products)

    def steps(self) -> tuple[int, int]:
        """Rows and prototypes of a piece."""
        views, teachers, rows, count = self.problem.sizes
        bytes_of_pair = 4 * (views + teachers) + (4 if self.products == "fp16x3" else 2) * views
        pairs = PIECE // views if self.way == "stream" else CHUNK // bytes_of_pair
        return steps(views, rows, count, pairs)

    def forward(self, gradients: bool) -> tuple[Tensor, ...]:
        """What the op's forward gives."""
        row_step, prototype_step = self.steps()
        _, teachers, _, count = self.problem.sizes
        if self.way == "chunks" and prototype_step == count <= WHOLE_ROWS // (teachers + 1):
            loss, log2_student, log2_teacher, sums = self.whole_rows(row_step, gradients)
        else:
            loss, log2_student, log2_teacher = self.statistics(row_step, prototype_step)
            sums = self.gradients(log2_student, log2_teacher, loss.dtype) if gradients else None
        empty = loss.new_empty(0)
        made = (empty, empty, empty) if sums is None else (sums.dz, sums.dprototypes, sums.scale)
        return loss, log2_student, log2_teacher, *made

    def statistics(self, row_step: int, prototype_step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and the sums of both branches."""
        problem, weights = self.problem, (self.problem.pair_weight, self.problem.row_weight)
        if self.way == "stream":
            return self.kernels.merge(*self.kernels.tiles(problem), *weights)  # type: ignore[return-value]
        _, _, rows, count = problem.sizes
        results = []
        for r in slices(rows, row_step):
            parts = [self.kernels.tiles(problem.piece(r, k).multiplied()) for k in slices(count, prototype_step)]
            tiles = [torch.cat(tensors) if len(tensors) > 1 else tensors[0] for tensors in zip(*parts, strict=True)]
            results.append(self.kernels.merge(*tiles, weights[0], weights[1][r]))
        if len(results) == 1:
            return results[0]  # type: ignore[return-value]
        losses, log2_student, log2_teacher = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.cat(log2_student, 1), torch.cat(log2_teacher, 1)

    def gradients(self, log2_student: Tensor, log2_teacher: Tensor, dtype: torch.dtype) -> GradientSums:
        """Both gradients, from the sums: the logits are computed again."""
        problem, sums = self.problem, GradientSums(self, *self.steps(), dtype)
        _, _, rows, count = problem.sizes
        for r in slices(rows, sums.row_step):
            for k in slices(count, sums.prototype_step):
                piece = problem.piece(r, k)
                piece = piece.multiplied() if self.way == "chunks" else piece
                of_rows = log2_student[:, r].contiguous(), log2_teacher[:, r].contiguous()
                sums.add(self.kernels.grad_logits(piece, *of_rows, sums.unit, self.gradient_dtype()), r, k)
        return sums

    def whole_rows(self, row_step: int, gradients: bool) -> tuple[Tensor, Tensor, Tensor, GradientSums | None]:
        """Everything in one pass over the rows: every logit is computed once."""
        problem = self.problem
        views, teachers, rows, count = problem.sizes
        losses, log2_student = problem.pair_weight.new_empty((2, views, rows)).unbind()
        log2_teacher = losses.new_empty((teachers, rows))
        sums: GradientSums | None = GradientSums(self, row_step, count, losses.dtype) if gradients else None
        unit, dtype = (sums.unit, self.gradient_dtype()) if sums else (losses.new_ones(()), None)
        for r in slices(rows, row_step):
            piece = problem.piece(r, slice(0, count)).multiplied()
            g = self.kernels.whole_rows(piece, unit, dtype, r.start, losses, log2_student, log2_teacher)
            if sums and g is not None:
                sums.add(g, r, slice(0, count))
        return losses.sum(), log2_student, log2_teacher, sums

    def gradient_dtype(self) -> torch.dtype:
        """Of the gradients of logits."""
        return torch.float32 if self.products == "fp16x3" else self.problem.z.dtype


class GradientSums:
    """dz and dprototypes, which grow by pieces; to be multiplied by `scale` at the end."""

    def __init__(self, passes: Passes, row_step: int, prototype_step: int, dtype: torch.dtype) -> None:
        problem, self.width, self.parts = passes.problem, passes.width, 2 if passes.products == "fp16x3" else 1
        assert problem.prototypes is not None
        self.row_step, self.prototype_step = row_step, prototype_step
        self.z, self.prototypes = problem.z, problem.prototypes
        self.unit = unit_of(problem.pair_weight, problem.row_weight)
        scale = 1 / problem.temperature / self.unit
        self.scale = torch.stack((scale, scale)) if passes.scales is None else passes.scales[:2].flip(0) * scale
        wide = accumulator(dtype)
        self.dz = self.z.new_empty((*self.z.shape[:2], self.width), dtype=wide)
        self.dprototypes = self.prototypes.new_empty((len(self.prototypes), self.width), dtype=wide)

    def add(self, grad_logits: Tensor, r: slice, k: slice) -> None:
        """Adds a piece's products: the first one of a row or a prototype is written without reading what was there."""
        g, width = grad_logits.flatten(0, 1), self.width
        prototypes = self.prototypes[k, : self.parts * width]  # all of them, or the two parts behind one another
        rows = self.z[:, r, -self.parts * width :].reshape(g.shape[0], -1)
        _accumulate(self.dz[:, r], g, prototypes, first=k.start == 0)
        _accumulate(self.dprototypes[k], g.T, rows, first=r.start == 0)


def steps(views: int, rows: int, prototypes: int, pairs: int) -> tuple[int, int]:
    """Rows and prototypes of a piece of at most `pairs` pairs of both.

    The longer side is cut, so that only the smaller gradient is summed over pieces.
    """
    if views * rows >= prototypes:
        return _even(rows, pairs // prototypes), prototypes
    return rows, _even(prototypes, pairs // rows)


def _even(size: int, most: int) -> int:
    """The length of equal parts of at most `most`, or of ALIGNED if that is more."""
    parts = math.ceil(size / max(most, ALIGNED))
    return min(size, math.ceil(size / parts / ALIGNED) * ALIGNED)


def slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _dots(rows: Tensor, prototypes: Tensor | None) -> Tensor:
    """All dot products, [views, rows, prototypes] in fp32."""
    assert prototypes is not None
    return _product(rows.reshape(-1, rows.shape[2]), prototypes.T).view(*rows.shape[:2], len(prototypes))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In fp32, also of 16-bit factors; only a GPU multiplies those without a copy."""
    return a.float() @ b.float() if a.device.type == "cpu" else torch.mm(a, b, out_dtype=torch.float32)


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In place if the dtype stays."""
    return torch.mul(total, factor, out=total if total.dtype == dtype else total.new_empty(total.shape, dtype=dtype))


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b, or total += a b. A `b` twice as wide as the total has both parts of its values: then `a` is split too."""
    width = total.shape[-1]
    if b.shape[1] == width and total.is_contiguous() and a.device.type != "cpu":
        flat = total.view(-1, width)
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=flat)
        else:
            torch.addmm(flat, a, b, out_dtype=torch.float32, out=flat)
        return
    if b.shape[1] == width:
        part = _product(a, b)
    else:
        high, low = factors.split(a, factors.LIFT)
        both = _product(high, b)
        part = both[:, :width] + both[:, width:] + _product(low, b[:, :width]) / factors.LIFT
    if first:
        total.copy_(part.view(total.shape))
    else:
        total.add_(part.view(total.shape))
