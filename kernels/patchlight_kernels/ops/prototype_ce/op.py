"""prototype_ce: cross-entropy between a teacher's and a student's distributions over many prototypes, without the logits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import extension, hardware
from ...arguments import accumulator, check_dtype, check_float, check_same_dtype, message, with_dense_rows
from ...dispatch import Impl, Op, first_reason, triton_call
from ...losses import differentiate_loss, two_kernels
from . import pieces, reference

OP_NAME = "prototype_ce"


def _bind(
    z: Tensor,
    prototypes: Tensor,
    teacher_z: Tensor,
    teacher_prototypes: Tensor,
    temperature: float,
    teacher_temperature: float,
    pair_weight: Tensor,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    _check_rows(z, prototypes, teacher_z, teacher_prototypes)
    _check_weights(z, prototypes, teacher_z, pair_weight, row_weight, bias)
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        check_float(OP_NAME, name, value, "divide z by it and pass 1.0")
        if not value > 0:
            raise ValueError(message(OP_NAME, f"{name} must be positive", value, "0.1 and 0.04 are usual"))
    if row_weight is None:
        row_weight = z.new_full((z.shape[1],), 1 / max(z.shape[1], 1), dtype=accumulator(z.dtype))
    # On a CPU the forward makes the gradients too, while the logits of a chunk are in cache: computing those again would
    # cost as much as the gradients. On a GPU the backward does, as keeping what it needs would cost more than that.
    gradients = torch.is_grad_enabled() and (z.requires_grad or prototypes.requires_grad) and z.device.type == "cpu"
    rows = [with_dense_rows(x) for x in (z, prototypes, teacher_z.detach(), teacher_prototypes.detach())]
    weights = [None if x is None else x.detach().contiguous() for x in (pair_weight, row_weight, bias)]
    return (*rows, float(temperature), float(teacher_temperature), *weights, gradients)


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


def _cuda_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, *_) -> str | None:
    reason = first_reason(
        hardware.unsupported_by_all(z.dtype, z, teacher_z), hardware.no_cuda_library(z, "prototype_ce_bwd")
    )
    if reason or z.device.type != "cuda":
        return reason
    needed = _cuda_shared_bytes(len(teacher_z), z.shape[2], z.dtype.itemsize)
    return hardware.too_little_shared_memory(z, needed)


def _triton_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, *_) -> str | None:
    return first_reason(hardware.unsupported_by_all(z.dtype, z, teacher_z), hardware.no_triton(z))


def _cpp_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, *_) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(z.dtype, z, teacher_z), hardware.no_cpu_library(z, "prototype_ce_fwd")
    )


def _cuda_statistics(*args) -> tuple[Tensor, Tensor, Tensor]:
    return extension.native("prototype_ce_fwd")(*args[:-1], False)[:3]


def _cuda_grad_logits(args: tuple, log2_student: Tensor, log2_teacher: Tensor, unit: Tensor) -> Tensor:
    return extension.native("prototype_ce_bwd")(*args[:-1], log2_student, log2_teacher, unit)


_triton_statistics = triton_call(__package__, "prototype_ce_fwd")
_cuda_gradients = functools.partial(pieces.gradients, _cuda_grad_logits)
_triton_gradients = functools.partial(pieces.gradients, triton_call(__package__, "grad_logits"))

OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        two_kernels("cuda", _cuda_statistics, _cuda_gradients, _cuda_unsupported, count=2),
        # The C++ forward makes the gradients if they are wanted at once; if they are wanted later, the reference does.
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", extension.native_call("prototype_ce_fwd"), _cpp_unsupported, reference.prototype_ce_bwd),
        two_kernels("triton", _triton_statistics, _triton_gradients, _triton_unsupported, count=2),
        Impl("reference", reference.prototype_ce_fwd, lambda *args: None, reference.prototype_ce_bwd),
    ),
)


def _run(*args) -> tuple[Tensor, ...]:
    with torch.autocast(args[0].device.type, enabled=False):  # products inside an implementation keep their precision
        return OP.forward(*args)


def _fake(
    z: Tensor, prototypes: Tensor, teacher_z: Tensor, teacher_prototypes: Tensor, temperature: float,
    teacher_temperature: float, pair_weight: Tensor, row_weight: Tensor, bias: Tensor | None, gradients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = accumulator(z.dtype)
    shapes = ((), z.shape[:2], teacher_z.shape[:2], z.shape if gradients else 0, prototypes.shape if gradients else 0)
    return tuple(z.new_empty(shape, dtype=dtype) for shape in shapes)


_fwd = OP.define(
    "fwd",
    "(Tensor z, Tensor prototypes, Tensor teacher_z, Tensor teacher_prototypes, float temperature, "
    "float teacher_temperature, Tensor pair_weight, Tensor row_weight, Tensor? bias, bool gradients) "
    "-> (Tensor loss, Tensor log2_student, Tensor log2_teacher, Tensor dz, Tensor dprototypes)",
    run=_run,
    fake=_fake,
)


def _run_bwd(
    grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, dz: Tensor, dprototypes: Tensor, *args
) -> tuple[Tensor, Tensor]:
    dtype, device, gradients = args[0].dtype, args[0].device, args[-1]
    if gradients:
        return (dz * grad_loss).to(dtype), (dprototypes * grad_loss).to(dtype)
    with torch.autocast(device.type, enabled=False):
        return OP.choose(*args).bwd(grad_loss, log2_student, log2_teacher, *args)


def _fake_bwd(grad_loss, log2_student, log2_teacher, dz, dprototypes, z, prototypes, *_) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), prototypes.new_empty(prototypes.shape)


_bwd = OP.define(
    "bwd",
    "(Tensor grad_loss, Tensor log2_student, Tensor log2_teacher, Tensor dz, Tensor dprototypes, "
    "Tensor z, Tensor prototypes, Tensor teacher_z, Tensor teacher_prototypes, float temperature, "
    "float teacher_temperature, Tensor pair_weight, Tensor row_weight, Tensor? bias, bool gradients) "
    "-> (Tensor, Tensor)",
    run=_run_bwd,
    fake=_fake_bwd,
)


differentiate_loss(OP, _bwd)


def prototype_ce(
    z: Tensor,
    prototypes: Tensor,
    teacher_z: Tensor,
    teacher_prototypes: Tensor,
    temperature: float,
    teacher_temperature: float,
    pair_weight: Tensor,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
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
        teacher_temperature: the teacher's.
        pair_weight: [T, S] fp32, 0 leaves a pair out.
        row_weight: [R] fp32, by default 1/R each.
        bias: [K] fp32, added to the teacher's logits before the temperature: minus the center, or a Sinkhorn potential.

    Returns:
        The loss, an fp32 scalar. Gradients reach z and prototypes only, nothing of the teacher and no weight.

    16-bit values are multiplied exactly, and logits, exponentials and sums are fp32, also under autocast. On tensor cores
    the gradient of a logit is rounded to the dtype of z once, for its two products, as autocast would.
    Traffic: the rows once and the prototypes once per block of rows. On a GPU the forward keeps the log-sum-exps of the
    rows; on a CPU it makes the gradients at once (fp32, the size of z and of prototypes) and the backward scales them.
    """
    weights = pair_weight, row_weight, bias
    args = _bind(z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, *weights)
    return _fwd(*args)[0]
