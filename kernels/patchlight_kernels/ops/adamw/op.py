"""adamw: clipping, AdamW, the moving average and the 16-bit copies of all parameters in one sweep, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import extension, hardware
from ...addresses import addresses_of, aligned, blocks_of, table_of
from ...arguments import check_dtype, check_number, check_required, check_tensor_list, kind_of, message
from ...dispatch import Impl, Op, first_reason, triton_call
from . import reference

OP_NAME = "adamw"
DECAYED, FROZEN, WITH_GRADIENT = 1, 2, 4  # bits of a parameter's flags
CHANGED = (0, 2, 3, 4, 5, 6)  # of the lists of tensors: all but the gradients


def _bind(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    scale: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    freeze: Tensor,
    refused: Tensor,
    decayed: Sequence[bool],
    frozen: Sequence[bool] = (),
    teachers: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    teacher_copies: Sequence[Tensor] = (),
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    lists = {"parameters": parameters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    optional = {"teachers": teachers, "copies": copies, "teacher_copies": teacher_copies}
    for name, tensors in (lists | optional).items():
        check_tensor_list(OP_NAME, name, tensors)
    check_tensor_list(OP_NAME, "gradients", gradients, optional=True)
    if not parameters:
        raise ValueError(message(OP_NAME, "there must be parameters", "none", "do not call it then"))
    if len(gradients) != len(parameters):
        rule = f"gradients must have a tensor or None for each of the {len(parameters)} parameters"
        raise ValueError(message(OP_NAME, rule, len(gradients), "pass as many"))
    present = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None]
    _check_list("gradients", [g for g, _ in present], [p for _, p in present])
    for name, tensors in lists.items():
        _check_list(name, tensors, parameters)
    for name, tensors in optional.items():
        if tensors:
            _check_list(name, tensors, parameters, optional=True)
    count, device = len(parameters), parameters[0].device
    check_required(OP_NAME, steps=steps, scale=scale)
    for name, value in (("steps", steps), ("scale", scale)):
        if value.shape != (count,) or value.device != device:
            rule = f"{name} must have a value on {device} for each of the {count} parameters"
            raise ValueError(message(OP_NAME, rule, f"shape {tuple(value.shape)} on {value.device}", "stack them"))
    numbers = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "freeze": freeze, "refused": refused}
    for name, value in numbers.items():
        if not isinstance(value, Tensor) or value.dim() or value.device != device:
            got = f"{value.device} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(message(OP_NAME, f"{name} must be a 0-d tensor on {device}", got, "make it one"))
    numbers = {name: value if name == "refused" else value.double() for name, value in numbers.items()}
    dense = [None if gradient is None else gradient.detach().contiguous() for gradient in gradients]
    groups = _flags("decayed", decayed, count), _flags("frozen", frozen, count, optional=True)
    rest = (list(exp_avgs), list(exp_avg_sqs), list(teachers), list(copies), list(teacher_copies), steps)
    return (list(parameters), dense, *rest, scale.contiguous(), *numbers.values(), *groups, *_constants(betas, eps))


def _flags(name: str, members: Sequence[bool], count: int, optional: bool = False) -> list[bool]:
    rule = f"{name} must be a list that says yes or no for each of the {count} parameters"
    if not isinstance(members, (list, tuple)):
        raise TypeError(message(OP_NAME, rule, kind_of(members), "make it a list"))
    if optional and not members:
        return [False] * count
    if len(members) != count:
        raise ValueError(message(OP_NAME, rule, len(members), "give as many"))
    return [bool(member) for member in members]


def _constants(betas: tuple[float, float], eps: float) -> tuple[float, float, float]:
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise TypeError(message(OP_NAME, "betas must be two numbers", repr(betas), "0.9 and 0.999 are usual"))
    beta1, beta2 = betas
    for name, value in (("betas[0]", beta1), ("betas[1]", beta2), ("eps", eps)):
        check_number(OP_NAME, name, value, "0.9, 0.999 and 1e-8 are usual")
        if not 0 <= value < 1:
            raise ValueError(message(OP_NAME, f"{name} must be in [0, 1)", value, "0.9, 0.999 and 1e-8 are usual"))
    return float(beta1), float(beta2), float(eps)


def _check_list(name: str, tensors: Sequence[Tensor], parameters: Sequence[Tensor], optional: bool = False) -> None:
    """One tensor for each parameter, as large and on the same device, all of one dtype; `optional`: or empty."""
    if len(tensors) != len(parameters):
        rule = f"{name} must have a tensor for each of the {len(parameters)} parameters"
        raise ValueError(message(OP_NAME, rule, len(tensors), "pass empty tensors where there is none"))
    dtypes = {tensor.dtype for tensor in tensors if tensor.numel()}
    if len(dtypes) > 1:
        raise TypeError(message(OP_NAME, f"{name} must have one dtype", sorted(map(str, dtypes)), "cast them"))
    for dtype in dtypes:
        check_dtype(OP_NAME, name, dtype)
    for number, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
        if optional and tensor.numel() == 0:
            continue
        if tensor.shape != parameter.shape or tensor.device != parameter.device:
            rule = f"{name}[{number}] must be {tuple(parameter.shape)} on {parameter.device} like the parameter"
            raise ValueError(message(OP_NAME, rule, f"{tuple(tensor.shape)} on {tensor.device}", "check the order"))


class Prepared(NamedTuple):
    """What the kernels take for the lists."""

    table: Tensor  # int64 [9, parameters]: values, flags, and the addresses of the seven lists
    blocks: Tensor
    gradient: torch.dtype
    copy: torch.dtype
    aligned: bool


def prepared(lists: Sequence[Sequence], decayed: Sequence[bool], frozen: Sequence[bool]) -> Prepared:
    """Tables for the kernels; tells autograd that the tensors change, as kernels write by address."""
    parameters, gradients, device = lists[0], lists[1], lists[0][0].device
    counts = tuple([parameter.numel() for parameter in parameters])
    members = zip(decayed, frozen, gradients, strict=True)
    flags = tuple([DECAYED * d + FROZEN * f + WITH_GRADIENT * (g is not None) for d, f, g in members])
    none = (0,) * len(counts)
    addresses = [addresses_of(tensors) if tensors else none for tensors in lists]
    for place in CHANGED:
        torch.autograd.graph.increment_version(lists[place])
    return Prepared(
        table_of((counts, flags, *addresses), device),
        blocks_of(counts, device),
        dtype_of(gradients, torch.float32),
        dtype_of([*lists[5], *lists[6]], torch.bfloat16),
        aligned(tuple(addresses)),
    )


def dtype_of(tensors: Sequence[Tensor | None], otherwise: torch.dtype) -> torch.dtype:
    """The dtype of those tensors that have values."""
    return next((tensor.dtype for tensor in tensors if tensor is not None and tensor.numel()), otherwise)


def _native_fwd(*args) -> None:
    lists, (steps, scale, *numbers), (decayed, frozen), constants = args[:7], args[7:14], args[14:16], args[16:]
    ready = prepared(lists, decayed, frozen)
    extension.native("adamw_fwd")(
        ready.table, ready.blocks, steps, scale, *numbers, *constants, ready.gradient, ready.copy
    )


def _unsupported_by_all(*args) -> str | None:
    parameters, gradients, exp_avgs, exp_avg_sqs, teachers, copies, teacher_copies, steps, scale = args[:9]
    if all(parameter.numel() == 0 for parameter in parameters):
        return "there is nothing to compute"
    state = (parameters, exp_avgs, exp_avg_sqs, teachers, [steps, scale, args[13]])
    if any(dtype_of(tensors, torch.float32) != torch.float32 for tensors in state):
        return "parameters and state in another dtype than float32 run the reference only"
    if dtype_of(gradients, torch.float32) == torch.float64:
        return "float64 runs the reference only"
    half = {dtype_of(tensors, torch.bfloat16) for tensors in (copies, teacher_copies) if tensors}
    if len(half) > 1 or not half <= {torch.bfloat16, torch.float16}:
        return "copies in another dtype than one of 16 bits run the reference only"
    changed = (parameters, exp_avgs, exp_avg_sqs, teachers, copies, teacher_copies, [steps])
    if not all(tensor.is_contiguous() for tensors in changed for tensor in tensors):
        return "a tensor that it changes is not contiguous"
    return None


def _cuda_unsupported(*args) -> str | None:
    return first_reason(_unsupported_by_all(*args), hardware.no_cuda_library(args[0][0], "adamw_fwd"))


def _cpp_unsupported(*args) -> str | None:
    return first_reason(_unsupported_by_all(*args), hardware.no_cpu_library(args[0][0], "adamw_fwd"))


def _triton_unsupported(*args) -> str | None:
    return first_reason(_unsupported_by_all(*args), hardware.no_triton(args[0][0]))


OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        Impl("cuda", _native_fwd, _cuda_unsupported),
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", _native_fwd, _cpp_unsupported),
        Impl("triton", triton_call(__package__, "adamw_fwd"), _triton_unsupported),
        Impl("reference", reference.adamw_fwd, lambda *args: None),
    ),
)

_fwd = OP.define(
    "fwd",
    "(Tensor(a!)[] parameters, Tensor?[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] teachers, "
    "Tensor(e!)[] copies, Tensor(f!)[] teacher_copies, Tensor(g!) steps, Tensor scale, Tensor lr, Tensor weight_decay, "
    "Tensor momentum, Tensor freeze, Tensor refused, bool[] decayed, bool[] frozen, float beta1, float beta2, float eps) -> ()",
    run=OP.forward,
    fake=lambda *args: None,
)


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    scale: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    freeze: Tensor,
    refused: Tensor,
    decayed: Sequence[bool],
    frozen: Sequence[bool] = (),
    teachers: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    teacher_copies: Sequence[Tensor] = (),
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of AdamW (decoupled weight decay) on all parameters, in place; then each teacher moves towards its parameter.

    What may differ from step to step is read from tensors, so a CUDA graph of the call stays right.

    Args:
        parameters, exp_avgs, exp_avg_sqs: P tensors each, fp32 and contiguous (others run the reference).
        gradients: P tensors, fp32, bf16 or fp16. None: that parameter and its state stay.
        steps: [P] fp32, the updates that each parameter has had.
        scale: [P] fp32; each gradient is multiplied by its own, which may clip it and undo the scale of the loss.
        lr, weight_decay, momentum: 0-d float64; momentum is that of the teachers.
        freeze: 0-d; above 0 the parameters in `frozen` and their state stay.
        refused: 0-d fp32; above 0 nothing changes at all.
        decayed, frozen: for each parameter, whether it decays, and whether it belongs to those that may be frozen.
        teachers: P tensors or none; an empty one where a parameter has no teacher. They move in every step that is not refused.
        copies, teacher_copies: P tensors or none, bf16 or fp16, which get the new values; an empty one where none is wanted.
        betas, eps: as in torch.optim.AdamW.

    No gradient; fp32 inside, the numbers of a step in fp64. Traffic: everything is read and written once: 28 bytes per parameter,
    8 more with a teacher, 2 more for each copy.
    """
    with torch.no_grad():
        _fwd(
            *_bind(
                parameters,
                gradients,
                exp_avgs,
                exp_avg_sqs,
                steps,
                scale,
                lr,
                weight_decay,
                momentum,
                freeze,
                refused,
                decayed,
                frozen,
                teachers,
                copies,
                teacher_copies,
                betas,
                eps,
            )
        )
