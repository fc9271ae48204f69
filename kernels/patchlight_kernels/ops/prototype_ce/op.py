"""prototype_ce: cross-entropy between a teacher's and a student's distributions over many prototypes, without the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import extension, hardware
from ...dispatch import Impl, Op, first_reason
from . import pieces, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """Checks the public arguments and returns the raw ones."""
    _check_rows(z, prototypes, teacher_z, teacher_prototypes)
    _check_weights(z, prototypes, teacher_z, pair_weight, row_weight, bias)
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if isinstance(value, Tensor):
            raise TypeError(f"prototype_ce: {name} must be a Python float, got a tensor; divide z by it and pass 1.0")
        if not value > 0:
            raise ValueError(f"prototype_ce: {name} must be positive, got {value}; 0.1 and 0.04 are usual")
    if row_weight is None:
        row_weight = z.new_full((z.shape[1],), 1 / max(z.shape[1], 1), dtype=reference.exact_dtype(z.dtype))
    # On a CPU the forward makes the gradients too, while the logits of a chunk are at hand: computing those again would
    # cost as much as the gradients. On a GPU the backward does, as keeping what it needs would cost more than that.
    gradients = torch.is_grad_enabled() and (z.requires_grad or prototypes.requires_grad) and z.device.type == "cpu"
    rows = [_dense(x) for x in (z, prototypes, teacher_z.detach(), teacher_prototypes.detach())]
    weights = [None if x is None else x.detach().contiguous() for x in (pair_weight, row_weight, bias)]
    return (*rows, float(temperature), float(teacher_temperature), *weights, gradients)


def _dense(rows: Tensor) -> Tensor:
    """The same rows, copied if their channels are not adjacent."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _check_rows(z: Tensor, prototypes: Tensor, teacher_z: Tensor, teacher_prototypes: Tensor) -> None:
    if z.dim() != 3:
        raise ValueError(
            f"prototype_ce: z must be [student views, rows, width], got shape {tuple(z.shape)}; "
            "stack the views and flatten images and patches into rows"
        )
    if z.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"prototype_ce: z must be float32, bfloat16, float16 or float64, got {z.dtype}; cast it")
    if teacher_z.dim() != 3 or teacher_z.shape[1:] != z.shape[1:]:
        raise ValueError(
            f"prototype_ce: teacher_z must be [teacher views, {z.shape[1]}, {z.shape[2]}] like z, got shape "
            f"{tuple(teacher_z.shape)}; row r of both is the same image or patch"
        )
    if prototypes.dim() != 2 or prototypes.shape[0] < 1 or prototypes.shape[1] != z.shape[2]:
        raise ValueError(
            f"prototype_ce: prototypes must be [count, {z.shape[2]}] with a count of at least 1, got shape "
            f"{tuple(prototypes.shape)}; pass the effective directions"
        )
    if teacher_prototypes.shape != prototypes.shape:
        raise ValueError(
            f"prototype_ce: teacher_prototypes must have the shape of prototypes, {tuple(prototypes.shape)}, got "
            f"{tuple(teacher_prototypes.shape)}; give both branches the same head"
        )
    for name, value in (
        ("prototypes", prototypes), ("teacher_z", teacher_z), ("teacher_prototypes", teacher_prototypes),
    ):  # fmt: skip
        if value.dtype != z.dtype:
            raise TypeError(f"prototype_ce: {name} must be {z.dtype} like z, got {value.dtype}; cast one of them")


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
    dtype = reference.exact_dtype(z.dtype)
    for name, (value, shape, meaning) in expected.items():
        if value is None:
            continue
        if value.shape != shape:
            raise ValueError(f"prototype_ce: {name} must be {shape}, got {tuple(value.shape)}; it is {meaning}")
        if value.dtype != dtype:
            raise TypeError(f"prototype_ce: {name} must be {dtype} beside a z in {z.dtype}, got {value.dtype}; cast it")


def _unfit(z: Tensor, prototypes: Tensor, teacher_z: Tensor) -> str | None:
    """What no fast implementation takes."""
    return first_reason(
        "float64 rows run the reference only" if z.dtype not in DTYPES else None,
        "there is nothing to compute" if 0 in (z.numel(), teacher_z.numel()) else None,
    )


def _cuda_shared_bytes(teachers: int, width: int, itemsize: int) -> int:
    """What the smallest block of the CUDA kernel needs: 16 positions of all teachers and of one student view."""
    teacher_warps, chunks = -(-16 * teachers // 32), -(-width * itemsize // 128)
    rows = chunks * (teacher_warps + 1) * 32 * 128
    stages, probabilities, scratch = 3 * 2 * 64 * 128, teacher_warps * 32 * 72 * 4, 16 * (64 * itemsize + 16)
    return rows + stages + probabilities + scratch


def _cuda_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, *_) -> str | None:
    reason = first_reason(_unfit(z, prototypes, teacher_z), hardware.no_cuda_library(z, "prototype_ce_bwd"))
    if reason or z.device.type != "cuda":
        return reason
    needed = _cuda_shared_bytes(len(teacher_z), z.shape[2], z.dtype.itemsize)
    room = torch.cuda.get_device_properties(z.device).shared_memory_per_block_optin
    return f"its rows need {needed} bytes of shared memory and this GPU has {room}" if needed > room else None


def _triton_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, *_) -> str | None:
    return first_reason(_unfit(z, prototypes, teacher_z), hardware.no_triton(z))


def _cpp_unsupported(z: Tensor, prototypes: Tensor, teacher_z: Tensor, *_) -> str | None:
    return first_reason(_unfit(z, prototypes, teacher_z), hardware.no_cpu_library(z, "prototype_ce_fwd"))


def _cpp_fwd(*raw) -> tuple[Tensor, ...]:
    return extension.native("prototype_ce_fwd")(*raw)


def _cuda_statistics(*raw) -> tuple[Tensor, Tensor, Tensor]:
    return extension.native("prototype_ce_fwd")(*raw[:-1], False)[:3]


def _cuda_grad_logits(raw: tuple, log2_student: Tensor, log2_teacher: Tensor, unit: Tensor) -> Tensor:
    return extension.native("prototype_ce_bwd")(*raw[:-1], log2_student, log2_teacher, unit)


def _triton_statistics(*raw) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import prototype_ce_fwd  # here, so that a machine without Triton can import the package

    return prototype_ce_fwd(*raw)


def _triton_grad_logits(*args) -> Tensor:
    from .triton_kernels import grad_logits

    return grad_logits(*args)


def _on_gpu(name: str, statistics: Callable, grad_logits: Callable, unsupported: Callable) -> Impl:
    """An implementation by two kernels: the loss with its statistics, and pieces of the gradient of the logits."""

    def fwd(*raw) -> tuple[Tensor, ...]:
        loss, *sums = statistics(*raw)
        if not raw[-1]:
            return loss, *sums, loss.new_empty(0), loss.new_empty(0)
        return loss, *sums, *pieces.gradients(grad_logits, loss.new_ones(()), *sums, raw, loss.dtype)

    def bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *raw) -> tuple[Tensor, Tensor]:
        return pieces.gradients(grad_logits, grad_loss, log2_student, log2_teacher, raw, raw[0].dtype)

    return Impl(name, fwd, unsupported, bwd)


OP = Op(
    "prototype_ce",
    bind=_bind,
    impls=(
        _on_gpu("cuda", _cuda_statistics, _cuda_grad_logits, _cuda_unsupported),
        # A C++ forward that was asked for gradients has made them; if it was not and somebody asks later, the reference does.
        # It comes before Triton, which has CPU tensors only in its interpreter.
        Impl("cpp", _cpp_fwd, _cpp_unsupported, reference.prototype_ce_bwd),
        _on_gpu("triton", _triton_statistics, _triton_grad_logits, _triton_unsupported),
        Impl("reference", reference.prototype_ce_fwd, lambda *raw: None, reference.prototype_ce_bwd),
    ),
)


def _run(*raw) -> tuple[Tensor, ...]:
    with torch.autocast(raw[0].device.type, enabled=False):  # products inside an implementation keep their precision
        return OP.choose(*raw).fwd(*raw)


def _fake(
    z: Tensor, prototypes: Tensor, teacher_z: Tensor, teacher_prototypes: Tensor, temperature: float,
    teacher_temperature: float, pair_weight: Tensor, row_weight: Tensor, bias: Tensor | None, gradients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    exact = reference.exact_dtype(z.dtype)
    shapes = ((), z.shape[:2], teacher_z.shape[:2], z.shape if gradients else 0, prototypes.shape if gradients else 0)
    return tuple(z.new_empty(shape, dtype=exact) for shape in shapes)


_fwd = OP.define(
    "fwd",
    "(Tensor z, Tensor prototypes, Tensor teacher_z, Tensor teacher_prototypes, float temperature, "
    "float teacher_temperature, Tensor pair_weight, Tensor row_weight, Tensor? bias, bool gradients) "
    "-> (Tensor loss, Tensor log2_student, Tensor log2_teacher, Tensor dz, Tensor dprototypes)",
    run=_run,
    fake=_fake,
)


def _run_bwd(
    grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, dz: Tensor, dprototypes: Tensor, *raw
) -> tuple[Tensor, Tensor]:
    dtype, device, gradients = raw[0].dtype, raw[0].device, raw[-1]
    if gradients:
        return (dz * grad_loss).to(dtype), (dprototypes * grad_loss).to(dtype)
    with torch.autocast(device.type, enabled=False):
        return OP.choose(*raw).bwd(grad_loss, log2_student, log2_teacher, *raw)


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


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as the gradients would come in for those
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*output[1:], *(value if isinstance(value, Tensor) else None for value in inputs))


def _backward(ctx, grad_loss: Tensor | None, *_) -> tuple:
    if grad_loss is None:  # nothing depends on the loss
        return (None,) * len(ctx.others)
    log2_student, log2_teacher, dz, dprototypes, *tensors = ctx.saved_tensors
    raw = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
    gradients = _bwd(grad_loss, log2_student, log2_teacher, dz, dprototypes, *raw)
    return *gradients, *([None] * (len(raw) - len(gradients)))


OP.differentiate(_setup_context, _backward)


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
    Q[s, r] = softmax(z[s, r] prototypes^T / temperature). This is the loss of DINO, iBOT and of what builds on them.

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
    raw = _bind(
        z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, pair_weight, row_weight, bias
    )
    return _fwd(*raw)[0]
