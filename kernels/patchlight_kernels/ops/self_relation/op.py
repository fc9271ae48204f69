"""self_relation: cross-entropy between a teacher's and a student's self-relations, without the relations in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import extension, hardware
from ...dispatch import Impl, Op, first_reason
from . import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _bind(
    student: Tensor, teacher: Tensor, student_scale: float, teacher_scale: float, weight: Tensor | None = None
) -> tuple:
    """Checks the public arguments and returns the raw ones."""
    _check_features(student, teacher)
    for name, value in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
        if isinstance(value, Tensor):
            raise TypeError(
                f"self_relation: {name} must be a Python float, got a tensor; multiply the features instead"
            )
        if not 0 < value < float("inf"):
            raise ValueError(
                f"self_relation: {name} must be positive and finite, got {value}; width ** -0.5 / temperature is usual"
            )
    weight = _checked_weight(weight, student)
    # On a CPU the forward makes the gradient too, while a sample's relation is in a cache: computing it again would cost
    # as much as the gradient. On a GPU the backward does, as it fits no cache there.
    gradients = torch.is_grad_enabled() and student.requires_grad and student.device.type == "cpu"
    return student, teacher.detach(), float(student_scale), float(teacher_scale), weight, gradients


def _check_features(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 5:
        raise ValueError(
            f"self_relation: student must be [views, images, heads, rows, width], got shape {tuple(student.shape)}; "
            "stack the views, and give a channel relation one head"
        )
    if student.dtype not in (*DTYPES, torch.float64):
        raise TypeError(
            f"self_relation: student must be float32, bfloat16, float16 or float64, got {student.dtype}; cast it"
        )
    if teacher.dim() != 4 or teacher.shape[:3] != student.shape[1:4]:
        images, heads, rows = student.shape[1:4]
        raise ValueError(
            f"self_relation: teacher must be [{images}, {heads}, {rows}, width] like a view of the student, got shape "
            f"{tuple(teacher.shape)}; sample both at the same points"
        )
    if teacher.dtype != student.dtype:
        raise TypeError(
            f"self_relation: teacher must be {student.dtype} like student, got {teacher.dtype}; cast one of them"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"self_relation: teacher must be on {student.device} like student, got {teacher.device}; move one of them"
        )


def _checked_weight(weight: Tensor | None, student: Tensor) -> Tensor:
    shape, dtype = student.shape[:2], reference.exact_dtype(student.dtype)
    if weight is None:
        return torch.full(shape, 1 / max(1, shape.numel()), dtype=dtype, device=student.device)
    if weight.shape != shape:
        raise ValueError(
            f"self_relation: weight must be {tuple(shape)}, got {tuple(weight.shape)}; it is [views, images], 0 leaves "
            "a sample out"
        )
    if weight.dtype != dtype:
        raise TypeError(
            f"self_relation: weight must be {dtype} beside a student in {student.dtype}, got {weight.dtype}; cast it"
        )
    if weight.device != student.device:
        raise ValueError(
            f"self_relation: weight must be on {student.device} like student, got {weight.device}; move it"
        )
    return weight.detach().contiguous()


def _unfit(student: Tensor, teacher: Tensor) -> str | None:
    """What no fast implementation takes."""
    return first_reason(
        "float64 features run the reference only" if student.dtype not in DTYPES else None,
        "there is nothing to relate" if 0 in (student.numel(), teacher.numel()) else None,
    )


def _cuda_shared_bytes(width: int, teacher_width: int, itemsize: int) -> int:
    """What the smallest block of the CUDA kernels needs: 16 rows of both sides, stages and, in fp32, a factor."""
    chunks = sum(-(-channels * itemsize // 128) for channels in (width, teacher_width))
    return chunks * 16 * 128 + 3 * 64 * 128 + (16 * 72 * 4 if itemsize == 4 else 0)


def _cuda_unsupported(student: Tensor, teacher: Tensor, *_) -> str | None:
    reason = first_reason(_unfit(student, teacher), hardware.no_cuda_library(student, "self_relation_bwd"))
    if reason or student.device.type != "cuda":
        return reason
    needed = _cuda_shared_bytes(student.shape[-1], teacher.shape[-1], student.dtype.itemsize)
    room = torch.cuda.get_device_properties(student.device).shared_memory_per_block_optin
    return f"its rows need {needed} bytes of shared memory and this GPU has {room}" if needed > room else None


def _triton_unsupported(student: Tensor, teacher: Tensor, *_) -> str | None:
    return first_reason(_unfit(student, teacher), hardware.no_triton(student))


def _cpp_unsupported(student: Tensor, teacher: Tensor, *_) -> str | None:
    return first_reason(_unfit(student, teacher), hardware.no_cpu_library(student, "self_relation_fwd"))


def _cpp_fwd(*raw) -> tuple[Tensor, ...]:
    return extension.native("self_relation_fwd")(*raw)


def _dense(rows: Tensor) -> Tensor:
    """The same rows, copied if their channels are not adjacent."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _cuda_statistics(student: Tensor, teacher: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    native = extension.native("self_relation_fwd")
    losses, *sums, _ = native(_dense(student), _dense(teacher), *others[:-1], False)
    return losses.sum(), *sums


def _cuda_gradient(
    dtype: torch.dtype, grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, student: Tensor, teacher: Tensor,
    *others,
) -> Tensor:  # fmt: skip
    sums = log2_student, log2_teacher, grad_loss.to(log2_student.dtype)
    native = extension.native("self_relation_bwd")
    return native(_dense(student), _dense(teacher), *others[:-1], *sums, dtype == torch.float32)


def _triton_statistics(*raw) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import self_relation_fwd  # here, so that a machine without Triton can import the package

    return self_relation_fwd(*raw)


def _triton_gradient(*args) -> Tensor:
    from .triton_kernels import self_relation_bwd

    return self_relation_bwd(*args)


def _on_gpu(name: str, statistics: Callable, gradient: Callable, unsupported: Callable) -> Impl:
    """An implementation by two kernels: the loss with its statistics, and the gradient from those, in the asked dtype."""

    def fwd(*raw) -> tuple[Tensor, ...]:
        loss, *sums = statistics(*raw)
        if not raw[-1]:
            return loss, *sums, loss.new_empty(0)
        return loss, *sums, gradient(loss.dtype, loss.new_ones(()), *sums, *raw)

    def bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, *raw) -> Tensor:
        return gradient(raw[0].dtype, grad_loss, log2_student, log2_teacher, *raw)

    return Impl(name, fwd, unsupported, bwd)


OP = Op(
    "self_relation",
    bind=_bind,
    impls=(
        _on_gpu("cuda", _cuda_statistics, _cuda_gradient, _cuda_unsupported),
        # A C++ forward that was asked for a gradient has made it; if it was not and somebody asks later, the reference does.
        # It comes before Triton, which has CPU tensors only in its interpreter.
        Impl("cpp", _cpp_fwd, _cpp_unsupported, reference.self_relation_bwd),
        _on_gpu("triton", _triton_statistics, _triton_gradient, _triton_unsupported),
        Impl("reference", reference.self_relation_fwd, lambda *raw: None, reference.self_relation_bwd),
    ),
)


def _run(*raw) -> tuple[Tensor, ...]:
    with torch.autocast(raw[0].device.type, enabled=False):  # products inside an implementation keep their precision
        return OP.choose(*raw).fwd(*raw)


def _fake(
    student: Tensor, teacher: Tensor, student_scale: float, teacher_scale: float, weight: Tensor, gradients: bool
) -> tuple[Tensor, ...]:
    exact = reference.exact_dtype(student.dtype)
    shapes = (), student.shape[:4], teacher.shape[:3], student.shape if gradients else 0
    return tuple(student.new_empty(shape, dtype=exact) for shape in shapes)


_fwd = OP.define(
    "fwd",
    "(Tensor student, Tensor teacher, float student_scale, float teacher_scale, Tensor weight, bool gradients) "
    "-> (Tensor loss, Tensor log2_student, Tensor log2_teacher, Tensor dstudent)",
    run=_run,
    fake=_fake,
)


def _run_bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, dstudent: Tensor, *raw) -> Tensor:
    student, gradients = raw[0], raw[-1]
    if gradients:
        return (dstudent * grad_loss).to(student.dtype)
    with torch.autocast(student.device.type, enabled=False):
        return OP.choose(*raw).bwd(grad_loss, log2_student, log2_teacher, *raw)


def _fake_bwd(grad_loss, log2_student, log2_teacher, dstudent, student, *_) -> Tensor:
    return student.new_empty(student.shape)


_bwd = OP.define(
    "bwd",
    "(Tensor grad_loss, Tensor log2_student, Tensor log2_teacher, Tensor dstudent, Tensor student, Tensor teacher, "
    "float student_scale, float teacher_scale, Tensor weight, bool gradients) -> Tensor",
    run=_run_bwd,
    fake=_fake_bwd,
)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as the gradient would come in for it
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*output[1:], *(value if isinstance(value, Tensor) else None for value in inputs))


def _backward(ctx, grad_loss: Tensor | None, *_) -> tuple:
    if grad_loss is None:  # nothing depends on the loss
        return (None,) * len(ctx.others)
    log2_student, log2_teacher, dstudent, *tensors = ctx.saved_tensors
    raw = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
    gradient = _bwd(grad_loss, log2_student, log2_teacher, dstudent, *raw)
    return gradient, *([None] * (len(raw) - 1))


OP.differentiate(_setup_context, _backward)


def self_relation(
    student: Tensor, teacher: Tensor, student_scale: float, teacher_scale: float, weight: Tensor | None = None
) -> Tensor:
    """How far the student's rows relate to each other from how the teacher's do, without a relation in memory.

    loss = sum over s, b of weight[s, b] mean over g, n of CE(P[b, g, n], Q[s, b, g, n]), CE(P, Q) = -sum_m P_m log Q_m,
    P[b, g, n] = softmax over m of teacher_scale teacher[b, g, n] . teacher[b, g, m] and
    Q[s, b, g, n] = softmax over m of student_scale student[s, b, g, n] . student[s, b, g, m].
    This is SERE's loss: the spatial one with positions as rows, the channel one with channels as rows.

    Args:
        student: [S, B, G, N, E] rows of S views, fp32, bf16 or fp16 (fp64 runs the reference), any strides: for the
            channel form pass a transpose, rows are channels and the width is the positions.
        teacher: [B, G, N, F] of one view; F may differ from E.
        student_scale: multiplied into the student's relation, a Python float: width ** -0.5 / temperature.
        teacher_scale: the teacher's.
        weight: [S, B] fp32, by default 1 / (S B) each. A sample of weight 0 counts for nothing, even if it holds NaN.

    Returns:
        The loss, an fp32 scalar. The gradient reaches student only.

    16-bit values are multiplied exactly, and relations, exponentials and sums are fp32, also under autocast. With 16-bit
    features the gradient of a relation is rounded to their dtype once, for its product with them.
    Rows that are all zero (no overlap) cost ln N and have no gradient.
    Traffic: the features. On a GPU the forward keeps two log-sum-exps a row; on a CPU it makes the gradient at once (fp32,
    the size of student) and the backward scales it.
    """
    return _fwd(*_bind(student, teacher, student_scale, teacher_scale, weight))[0]
