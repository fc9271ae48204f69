"""prototype_ce: cross-entropy between a teacher's and a student's distributions over many prototypes, without the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension, hardware
from ...arguments import (
    accumulator,
    check_dtype,
    check_float,
    check_required,
    check_same_dtype,
    check_tensors,
    message,
    with_dense_rows,
)
from ...dispatch import Impl, Op, first_reason, triton_call
from ...losses import differentiate_loss
from . import factors, pieces, reference

OP_NAME = "prototype_ce"
MOST_ROWS = 128  # of a block of the Triton kernels
MAX_TEACHERS = 14  # of the CUDA kernels: 16 positions of them fill seven of a block's eight warps


def _bind(
    z: Tensor,
    prototypes: Tensor,
    teacher_z: Tensor,
    teacher_prototypes: Tensor,
    temperature: float,
    teacher_temperature: float | Tensor,
    pair_weight: Tensor,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
    products: str | None = None,
) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    check_required(OP_NAME, z=z, prototypes=prototypes, teacher_z=teacher_z, teacher_prototypes=teacher_prototypes)
    check_required(OP_NAME, pair_weight=pair_weight)
    check_tensors(OP_NAME, row_weight=row_weight, bias=bias)
    _check_rows(z, prototypes, teacher_z, teacher_prototypes)
    _check_weights(z, prototypes, teacher_z, pair_weight, row_weight, bias)
    products = _chosen_products(z, products)
    check_float(OP_NAME, "temperature", temperature, "0.1 is usual; divide z by a tensor and pass 1.0")
    divisor, teacher_temperature = _teacher_temperature(z, teacher_temperature)
    check_float(OP_NAME, "teacher_temperature", teacher_temperature, "0.04 is usual")
    if row_weight is None:
        row_weight = z.new_full((z.shape[1],), 1 / max(z.shape[1], 1), dtype=accumulator(z.dtype))
    # The forward makes the gradients too where the logits are at hand: on a CPU in cache, on a GPU in L2 where it multiplies
    # in 16 bits. Else the backward computes the logits again, as keeping what it needs would cost more than that.
    at_once = z.device.type == "cpu" or products != "fp32"
    gradients = torch.is_grad_enabled() and (z.requires_grad or prototypes.requires_grad) and at_once
    sides: tuple[Tensor, ...] = z, prototypes, teacher_z.detach(), teacher_prototypes.detach()
    scales = None
    if products != "fp32":  # outside the op, so that a compiler can join it with what makes the tensors
        sides, scales = factors.of(z.detach(), prototypes.detach(), sides[2], sides[3], products)
    sides = tuple(with_dense_rows(x) for x in sides)
    weights = [None if x is None else x.detach().contiguous() for x in (pair_weight, row_weight, bias)]
    return (*sides, float(temperature), float(teacher_temperature), divisor, *weights, scales, products, gradients)


def _chosen_products(z: Tensor, products: str | None) -> str:
    """What fp32 rows are multiplied as; other dtypes are multiplied as they are, which is called "fp32" too."""
    if products is not None and products not in factors.PRODUCTS:
        rule, remedy = (
            f"products must be one of {factors.PRODUCTS}",
            "leave it out for the fastest that is exact to 5e-4",
        )
        raise ValueError(message(OP_NAME, rule, repr(products), remedy))
    if z.dtype != torch.float32:
        return "fp32"
    return products or ("fp16" if z.device.type == "cuda" else "fp32")


def _teacher_temperature(z: Tensor, value: float | Tensor) -> tuple[Tensor | None, float]:
    """The factor of the temperature that is on the device, which the host never reads, and the factor that is a number."""
    if not isinstance(value, Tensor):
        return None, value
    if value.dim() or not value.is_floating_point() or value.device != z.device:
        rule = f"teacher_temperature must be a number, or a floating tensor without dimensions on {z.device}"
        got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
        raise ValueError(message(OP_NAME, rule, got, "0.04 is usual"))
    return value.detach(), 1.0


def _check_rows(z: Tensor, prototypes: Tensor, teacher_z: Tensor, teacher_prototypes: Tensor) -> None:
    if z.dim() != 3:
        rule, remedy = (
            "z must be [student views, rows, width]",
            "stack the views, and flatten images and patches into rows",
        )
        raise ValueError(message(OP_NAME, rule, f"shape {tuple(z.shape)}", remedy))
    check_dtype(OP_NAME, "z", z.dtype)
    if teacher_z.dim() != 3 or teacher_z.shape[1:] != z.shape[1:]:
        rule = f"teacher_z must be [teacher views, {z.shape[1]}, {z.shape[2]}] like z"
        remedy = "row r of both must be the same image or patch"
        raise ValueError(message(OP_NAME, rule, f"shape {tuple(teacher_z.shape)}", remedy))
    if prototypes.dim() != 2 or prototypes.shape[0] < 1 or prototypes.shape[1] != z.shape[2]:
        rule = f"prototypes must be [count, {z.shape[2]}] with a count of at least 1"
        raise ValueError(message(OP_NAME, rule, f"shape {tuple(prototypes.shape)}", "pass the effective directions"))
    if teacher_prototypes.shape != prototypes.shape:
        rule = f"teacher_prototypes must have the shape of prototypes, {tuple(prototypes.shape)}"
        raise ValueError(message(OP_NAME, rule, tuple(teacher_prototypes.shape), "give both branches the same head"))
    check_same_dtype(OP_NAME, "prototypes", prototypes, "z", z)
    check_same_dtype(OP_NAME, "teacher_z", teacher_z, "z", z)
    check_same_dtype(OP_NAME, "teacher_prototypes", teacher_prototypes, "z", z)


def _check_weights(
    z: Tensor,
    prototypes: Tensor,
    teacher_z: Tensor,
    pair_weight: Tensor,
    row_weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    expected = {
        "pair_weight": (pair_weight, (len(teacher_z), len(z)), "[teacher views, student views]; 0 leaves a pair out"),
        "row_weight": (row_weight, (z.shape[1],), "[rows]; leave it out for the mean over rows"),
        "bias": (bias, (len(prototypes),), "[prototypes]: minus the center, or the Sinkhorn potential"),
    }
    dtype = accumulator(z.dtype)
    for name, (value, shape, meaning) in expected.items():
        if value is None:
            continue
        if value.shape != shape:
            raise ValueError(message(OP_NAME, f"{name} must be {shape}", tuple(value.shape), f"it is {meaning}"))
        if value.dtype != dtype:
            raise TypeError(message(OP_NAME, f"{name} must be {dtype} beside a z in {z.dtype}", value.dtype, "cast it"))


def _cuda_shared_bytes(teachers: int, width: int, itemsize: int) -> int:
    """What the smallest block of the CUDA kernel needs: 16 positions of all teachers and of one student view."""
    teacher_warps, chunks = -(-16 * teachers // 32), -(-width * itemsize // 128)
    rows = chunks * (teacher_warps + 1) * 32 * 128
    stages, probabilities, scratch = 3 * 2 * 64 * 128, teacher_warps * 32 * 72 * 4, 16 * (64 * itemsize + 16)
    return rows + stages + probabilities + scratch


def _cuda_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, *others) -> str | None:
    reason = first_reason(
        hardware.unsupported_by_all(z.dtype, z, teacher_z), hardware.no_cuda_library(z, "prototype_ce_tiles")
    )
    if reason:
        return reason
    if len(teacher_z) > MAX_TEACHERS:
        return f"a block holds at most {MAX_TEACHERS} teacher views, got {len(teacher_z)}"
    products = others[-2]
    if pieces.way(len(z), z.shape[1], len(prototypes), products) == "chunks":
        return None
    needed = _cuda_shared_bytes(len(teacher_z), z.shape[2], z.dtype.itemsize)
    return hardware.too_little_shared_memory(z, needed)


def _triton_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, teacher_prototypes: Tensor, *_) -> str | None:
    apart = max(z.stride(1), teacher_z.stride(1), prototypes.stride(0), teacher_prototypes.stride(0))
    return first_reason(
        hardware.unsupported_by_all(z.dtype, z, teacher_z),
        hardware.no_triton(z),
        hardware.offsets_too_large(MOST_ROWS * apart),
    )


def _cpp_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, *others) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(z.dtype, z, teacher_z),
        hardware.no_cpu_library(z, "prototype_ce_fwd"),
        None if others[-2] == "fp32" else f"it multiplies fp32 as fp32, not as {others[-2]}",
    )


def _cpp_forward(*args) -> tuple[Tensor, ...]:
    """The library reads the temperature of a tensor, which on a CPU waits for nothing; it multiplies in fp32 only."""
    *rows, temperature, teacher_temperature, divisor, pair_weight, row_weight, bias, _, _, gradients = args
    temperatures = temperature, teacher_temperature if divisor is None else teacher_temperature * float(divisor)
    weights = pair_weight, row_weight, bias
    results = extension.native("prototype_ce_fwd")(*rows, *temperatures, *weights, gradients)
    return *results, results[0].new_ones(2 if gradients else 0)


def _cuda_arguments(problem: pieces.Problem) -> tuple:
    """What the CUDA functions take of a problem."""
    p = problem
    sides = p.z, p.prototypes, p.teacher_z, p.teacher_prototypes
    return *sides, p.temperature, p.teacher_temperature, p.teacher_divisor, p.units, p.bias


def _cuda_tiles(problem: pieces.Problem) -> tuple[Tensor, ...]:
    return extension.native("prototype_ce_tiles")(*_cuda_arguments(problem))


def _cuda_grad_logits(problem: pieces.Problem, *sums_and_dtype) -> Tensor:
    weights = problem.pair_weight, problem.row_weight
    return extension.native("prototype_ce_grad_logits")(*_cuda_arguments(problem), *weights, *sums_and_dtype)


def _cuda_whole_rows(problem: pieces.Problem, unit: Tensor, dtype: torch.dtype | None, *outputs) -> Tensor | None:
    weights = problem.pair_weight, problem.row_weight, unit
    gradient = None if dtype is None else torch.empty_like(problem.z, dtype=dtype)
    z, _, teacher_z, _, *rest = _cuda_arguments(problem)
    extension.native("prototype_ce_whole_rows")(z, teacher_z, *rest, *weights, *outputs, gradient)
    return gradient


def _size(z: Tensor, prototypes: Tensor, *others) -> str:
    """Every view's rows count. Nobody has measured fp32 rows that are multiplied in fp16."""
    if others[-2] != "fp32":
        return "fp32 rows multiplied in fp16"
    few = len(z) * z.shape[1] < len(prototypes)
    return "fewer rows than prototypes" if few else "at least as many rows as prototypes"


_CUDA = pieces.Kernels(_cuda_tiles, extension.native_call("prototype_ce_merge"), _cuda_grad_logits, _cuda_whole_rows)
_TRITON = pieces.Kernels(*(triton_call(__package__, name) for name in ("tiles", "merge", "grad_logits", "whole_rows")))

OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        pieces.implementation("cuda", _CUDA, _cuda_unsupported),
        # The C++ forward makes the gradients if they are wanted at once; if they are wanted later, the reference does.
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", _cpp_forward, _cpp_unsupported, reference.prototype_ce_bwd),
        pieces.implementation("triton", _TRITON, _triton_unsupported),
        Impl("reference", reference.prototype_ce_fwd, lambda *args: None, reference.prototype_ce_bwd),
    ),
    size=_size,
)


def _run(*args) -> tuple[Tensor, ...]:
    with torch.autocast(args[0].device.type, enabled=False):  # products inside an implementation keep their precision
        return OP.forward(*args)


def _fake(
    z: Tensor, prototypes: Tensor, teacher_z: Tensor, teacher_prototypes: Tensor, temperature: float,
    teacher_temperature: float, teacher_divisor: Tensor | None, pair_weight: Tensor, row_weight: Tensor,
    bias: Tensor | None, scales: Tensor | None, products: str, gradients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, width = accumulator(z.dtype), factors.width(z, products)
    made = ((*z.shape[:2], width), (len(prototypes), width)) if gradients else (0, 0)
    shapes = (), z.shape[:2], teacher_z.shape[:2], *made, 2 if gradients else 0
    return tuple(z.new_empty(shape, dtype=dtype) for shape in shapes)


_ARGUMENTS = (
    "Tensor z, Tensor prototypes, Tensor teacher_z, Tensor teacher_prototypes, float temperature, "
    "float teacher_temperature, Tensor? teacher_divisor, Tensor pair_weight, Tensor row_weight, Tensor? bias, "
    "Tensor? scales, str products, bool gradients"
)
_fwd = OP.define(
    "fwd",
    f"({_ARGUMENTS}) -> (Tensor loss, Tensor log2_student, Tensor log2_teacher, Tensor dz, Tensor dprototypes, Tensor scale)",
    run=_run,
    fake=_fake,
)


def _run_bwd(
    grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, dz: Tensor, dprototypes: Tensor, scale: Tensor, *args
) -> tuple[Tensor, Tensor]:
    dtype, device, gradients = args[0].dtype, args[0].device, args[-1]
    if gradients:
        of_z, of_prototypes = (grad_loss * scale).unbind()
        return (dz * of_z).to(dtype), (dprototypes * of_prototypes).to(dtype)
    with torch.autocast(device.type, enabled=False):
        return OP.choose(*args, direction="backward").bwd(grad_loss, log2_student, log2_teacher, *args)


def _fake_bwd(
    grad_loss, log2_student, log2_teacher, dz, dprototypes, scale, z, prototypes, *_
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), prototypes.new_empty(prototypes.shape)


_bwd = OP.define(
    "bwd",
    "(Tensor grad_loss, Tensor log2_student, Tensor log2_teacher, Tensor dz, Tensor dprototypes, Tensor scale, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor)",
    run=_run_bwd,
    fake=_fake_bwd,
)


differentiate_loss(OP, _bwd)


class _RoundedLoss(torch.autograd.Function):
    """The loss from factors in fp16, with gradients in fp32 for the tensors that they were made from.

    Not part of the op, so that a compiler joins the last multiplication of the gradients with what follows.
    """

    @staticmethod
    def forward(ctx, z: Tensor, prototypes: Tensor, *args) -> Tensor:
        loss, _, _, *gradients = _fwd(*args)
        ctx.save_for_backward(*gradients)
        ctx.count = len(args)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        dz, dprototypes, scale = ctx.saved_tensors
        of_z, of_prototypes = (grad_loss * scale).unbind()
        return dz * of_z, dprototypes * of_prototypes, *([None] * ctx.count)


def prototype_ce(
    z: Tensor,
    prototypes: Tensor,
    teacher_z: Tensor,
    teacher_prototypes: Tensor,
    temperature: float,
    teacher_temperature: float | Tensor,
    pair_weight: Tensor,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
    products: str | None = None,
) -> Tensor:
    """How far the student's distributions over K prototypes are from the teacher's, without the logits in memory.

    loss = sum over t, s, r of pair_weight[t, s] row_weight[r] CE(P[t, r], Q[s, r]) with CE(P, Q) = -sum_k P_k log Q_k,
    P[t, r] = softmax((teacher_z[t, r] teacher_prototypes^T + bias) / teacher_temperature) and
    Q[s, r] = softmax(z[s, r] prototypes^T / temperature). This is the loss of DINO, iBOT and their successors.

    Args:
        z: [S, R, D] the student's rows of S views, fp32, bf16 or fp16 (fp64 runs the reference); rows may be strided.
        prototypes: [K, D] the student's effective directions, in the dtype of z.
        teacher_z: [T, R, D]; row r of all views is the same image or patch.
        teacher_prototypes: [K, D].
        temperature: the student's, a Python float.
        teacher_temperature: the teacher's, a Python float, or a floating tensor without dimensions on the device of z, which
            the host does not read (a CPU's library does).
        pair_weight: [T, S] fp32, 0 leaves a pair out.
        row_weight: [R] fp32, by default 1/R each.
        bias: [K] fp32, added to the teacher's logits before the temperature: minus the center, or a Sinkhorn potential.
        products: what fp32 values are multiplied as, for the logits and for their gradients; sums are fp32 always. "fp16":
            rounded to fp16, which keeps as many digits as tf32; gradients of logits are exact to 5e-4. "fp16x3": each value as
            two fp16 numbers, as exact as fp32. "fp32": as they are, without tensor cores. By default "fp16" on a GPU and
            "fp32" elsewhere. Other dtypes are multiplied as they are.

    Returns:
        The loss, an fp32 scalar. Gradients reach z and prototypes only, nothing of the teacher and no weight.

    16-bit values are multiplied exactly, and logits, exponentials and sums are fp32, also under autocast. On tensor cores
    the gradient of a logit is rounded to 16 bits once, for its two products, as autocast would; gradients have the dtype of z.
    fp32 tensors are brought into the range of fp16 by a power of two each, so their size does not matter; beside a tensor's
    largest value, values below 2^-28 of it lose digits.
    Traffic: the rows once and the prototypes once per block of rows. The forward makes the gradients at once (fp32, the size
    of z and of prototypes) on a CPU, and on a GPU with products in fp16; the backward scales them. Else it keeps the
    log-sum-exps of the rows.
    """
    weights = pair_weight, row_weight, bias, products
    args = _bind(z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, *weights)
    if args[-2] != "fp32" and args[-1]:
        return _RoundedLoss.apply(z, prototypes, *args)
    return _fwd(*args)[0]
