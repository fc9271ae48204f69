"""self_relation: cross-entropy between a teacher's and a student's self-relations, without the relations in memory."""

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
from ...losses import differentiate_loss, two_kernels
from . import reference

OP_NAME = "self_relation"


def _bind(
    student: Tensor, teacher: Tensor, student_scale: float, teacher_scale: float, weight: Tensor | None = None
) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    check_required(OP_NAME, student=student, teacher=teacher)
    check_tensors(OP_NAME, weight=weight)
    _check_features(student, teacher)
    for name, value in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
        check_float(
            OP_NAME, name, value, "width ** -0.5 / temperature is usual; a tensor multiplies the features instead"
        )
    weight = _checked_weight(weight, student)
    # On a CPU the forward makes the gradient too, while a sample's relation is in a cache: computing it again would cost
    # as much as the gradient. On a GPU the backward does, as the relation does not fit a cache there.
    gradients = torch.is_grad_enabled() and student.requires_grad and student.device.type == "cpu"
    return student, teacher.detach(), float(student_scale), float(teacher_scale), weight, gradients


def _check_features(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 5:
        rule, got = "student must be [views, images, heads, rows, width]", f"shape {tuple(student.shape)}"
        raise ValueError(message(OP_NAME, rule, got, "stack the views, and give a channel relation one head"))
    check_dtype(OP_NAME, "student", student.dtype)
    if teacher.dim() != 4 or teacher.shape[:3] != student.shape[1:4]:
        images, heads, rows = student.shape[1:4]
        rule = f"teacher must be [{images}, {heads}, {rows}, width] like a view of the student"
        raise ValueError(message(OP_NAME, rule, f"shape {tuple(teacher.shape)}", "sample both at the same points"))
    check_same_dtype(OP_NAME, "teacher", teacher, "student", student)
    _check_same_device("teacher", teacher, student)


def _check_same_device(name: str, x: Tensor, student: Tensor) -> None:
    if x.device != student.device:
        raise ValueError(message(OP_NAME, f"{name} must be on {student.device} like student", x.device, "move it"))


def _checked_weight(weight: Tensor | None, student: Tensor) -> Tensor:
    shape, dtype = student.shape[:2], accumulator(student.dtype)
    if weight is None:
        return torch.full(shape, 1 / max(1, shape.numel()), dtype=dtype, device=student.device)
    if weight.shape != shape:
        remedy = "it is [views, images], 0 leaves a sample out"
        raise ValueError(message(OP_NAME, f"weight must be {tuple(shape)}", tuple(weight.shape), remedy))
    if weight.dtype != dtype:
        rule = f"weight must be {dtype} beside a student in {student.dtype}"
        raise TypeError(message(OP_NAME, rule, weight.dtype, "cast it"))
    _check_same_device("weight", weight, student)
    return weight.detach().contiguous()


def _samples(student: Tensor) -> int:
    """Relations to compute: views, images and heads."""
    return student.shape[:3].numel()


def _cuda_shared_bytes(width: int, teacher_width: int, itemsize: int) -> int:
    """What the smallest block of the CUDA kernels needs: 16 rows of both sides, stages and, in fp32, a factor."""
    chunks = sum(-(-channels * itemsize // 128) for channels in (width, teacher_width))
    return chunks * 16 * 128 + 3 * 64 * 128 + (16 * 72 * 4 if itemsize == 4 else 0)


def _cuda_unsupported(student: Tensor, teacher: Tensor, *_) -> str | None:
    reason = first_reason(
        hardware.unsupported_by_all(student.dtype, student, teacher),
        hardware.no_cuda_library(student, "self_relation_bwd"),
    )
    if reason:
        return reason
    needed = _cuda_shared_bytes(student.shape[-1], teacher.shape[-1], student.dtype.itemsize)
    return first_reason(
        hardware.too_little_shared_memory(student, needed),
        hardware.grid_too_large(_samples(student), -(-student.shape[3] // 16)),
    )


def _triton_unsupported(student: Tensor, teacher: Tensor, *_) -> str | None:
    reason = first_reason(hardware.unsupported_by_all(student.dtype, student, teacher), hardware.no_triton(student))
    return reason or first_reason(
        hardware.offsets_too_large(student.shape[3] * max(student.shape[4], teacher.shape[3])),
        hardware.grid_too_large(_samples(student) * -(-student.shape[3] // 32)),
    )


def _cpp_unsupported(student: Tensor, teacher: Tensor, *_) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(student.dtype, student, teacher),
        hardware.no_cpu_library(student, "self_relation_fwd"),
    )


def _cuda_statistics(student: Tensor, teacher: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    native = extension.native("self_relation_fwd")
    losses, log2_student, log2_teacher, _ = native(
        with_dense_rows(student), with_dense_rows(teacher), *others[:-1], False
    )
    return losses.sum(), log2_student, log2_teacher


def _cuda_gradient(
    grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, args: tuple, dtype: torch.dtype
) -> Tensor:
    student, teacher, *others = args
    sums = log2_student, log2_teacher, grad_loss.to(log2_student.dtype)
    native = extension.native("self_relation_bwd")
    return native(with_dense_rows(student), with_dense_rows(teacher), *others[:-1], *sums, dtype == torch.float32)


def _triton_gradient(
    grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, args: tuple, dtype: torch.dtype
) -> Tensor:
    return triton_call(__package__, "self_relation_bwd")(dtype, grad_loss, log2_student, log2_teacher, *args)


_triton_statistics = triton_call(__package__, "self_relation_fwd")


def _size(student: Tensor, teacher: Tensor, *_) -> str:
    if max(student.shape[-1], teacher.shape[-1]) > 64:
        return "more than 64 channels"
    return f"{'64 rows or more' if student.shape[3] >= 64 else 'fewer than 64 rows'} of up to 64 channels"


OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        two_kernels("cuda", _cuda_statistics, _cuda_gradient, _cuda_unsupported, count=1),
        # The C++ forward makes the gradient if it is wanted at once; if it is wanted later, the reference does.
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", extension.native_call("self_relation_fwd"), _cpp_unsupported, reference.self_relation_bwd),
        two_kernels("triton", _triton_statistics, _triton_gradient, _triton_unsupported, count=1),
        Impl("reference", reference.self_relation_fwd, lambda *args: None, reference.self_relation_bwd),
    ),
    size=_size,
)


def _run(*args) -> tuple[Tensor, ...]:
    with torch.autocast(args[0].device.type, enabled=False):  # products inside an implementation keep their precision
        return OP.forward(*args)


def _fake(
    student: Tensor, teacher: Tensor, student_scale: float, teacher_scale: float, weight: Tensor, gradients: bool
) -> tuple[Tensor, ...]:
    dtype = accumulator(student.dtype)
    shapes = (), student.shape[:4], teacher.shape[:3], student.shape if gradients else 0
    return tuple(student.new_empty(shape, dtype=dtype) for shape in shapes)


_fwd = OP.define(
    "fwd",
    "(Tensor student, Tensor teacher, float student_scale, float teacher_scale, Tensor weight, bool gradients) "
    "-> (Tensor loss, Tensor log2_student, Tensor log2_teacher, Tensor dstudent)",
    run=_run,
    fake=_fake,
)


def _run_bwd(grad_loss: Tensor, log2_student: Tensor, log2_teacher: Tensor, dstudent: Tensor, *args) -> Tensor:
    student, gradients = args[0], args[-1]
    if gradients:
        return (dstudent * grad_loss).to(student.dtype)
    with torch.autocast(student.device.type, enabled=False):
        return OP.choose(*args, direction="backward").bwd(grad_loss, log2_student, log2_teacher, *args)


def _fake_bwd(grad_loss, log2_student, log2_teacher, dstudent, student, *_) -> Tensor:
    return student.new_empty(student.shape)


_bwd = OP.define(
    "bwd",
    "(Tensor grad_loss, Tensor log2_student, Tensor log2_teacher, Tensor dstudent, Tensor student, Tensor teacher, "
    "float student_scale, float teacher_scale, Tensor weight, bool gradients) -> Tensor",
    run=_run_bwd,
    fake=_fake_bwd,
)


differentiate_loss(OP, _bwd)


def self_relation(
    student: Tensor, teacher: Tensor, student_scale: float, teacher_scale: float, weight: Tensor | None = None
) -> Tensor:
    """Compares how the student's rows relate to each other with how the teacher's do, without a relation in memory.

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
        weight: [S, B] fp32, by default 1 / (S B) each. A sample of weight 0 changes nothing, even if it holds NaN.

    Returns:
        The loss, an fp32 scalar. The gradient reaches student only.

    16-bit values are multiplied exactly, and relations, exponentials and sums are fp32, also under autocast. With 16-bit
    features the gradient of a relation is rounded to their dtype once, for its product with them.
    Rows that are all zero (no overlap) cost ln N and have no gradient.
    Traffic: the features. On a GPU the forward keeps two log-sum-exps a row; on a CPU it makes the gradient at once (fp32,
    the size of student) and the backward scales it.
    """
    return _fwd(*_bind(student, teacher, student_scale, teacher_scale, weight))[0]
