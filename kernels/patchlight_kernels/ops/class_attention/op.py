"""class_attention: each state attends to itself and to patches, a few selected ones or all (SelfPatch's aggregation)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import hardware
from ...arguments import (
    accumulator,
    check_dtype,
    check_required,
    check_same_dtype,
    check_tensors,
    message,
    with_dense_rows,
)
from ...dispatch import Impl, Op, first_reason, triton_call
from ...extension import native_call
from . import reference
from .reference import state_shape

OP_NAME = "class_attention"
MAX_WIDTH = 256  # a head's row that the GPU kernels hold in registers
MAX_PATCHES = 24576  # counters of the inverse table, who reads each patch, that 96 KiB of shared memory hold


def _bind(
    q: Tensor, k_self: Tensor, v_self: Tensor, k_patches: Tensor, v_patches: Tensor, index: Tensor | None = None
) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    tensors = {"q": q, "k_self": k_self, "v_self": v_self, "k_patches": k_patches, "v_patches": v_patches}
    check_required(OP_NAME, **tensors)
    check_tensors(OP_NAME, index=index)
    for name, x in tensors.items():
        if x.dim() != 4:
            rule = f"{name} must be [images, rows, heads, width]"
            raise ValueError(message(OP_NAME, rule, f"shape {tuple(x.shape)}", "reshape it"))
        check_dtype(OP_NAME, name, x.dtype)
        check_same_dtype(OP_NAME, name, x, "q", q)
        if x.shape[2:] != q.shape[2:]:
            rule = f"{name} must have the heads and width of q, {tuple(q.shape[2:])}"
            raise ValueError(message(OP_NAME, rule, tuple(x.shape[2:]), "split both projections the same way"))
    if k_patches.shape != v_patches.shape:
        rule = f"v_patches must have the shape of k_patches, {tuple(k_patches.shape)}"
        raise ValueError(message(OP_NAME, rule, tuple(v_patches.shape), "project the same patches to both"))
    if index is not None:
        _check_index(index, k_patches)
    images, states = state_shape(q, k_self, v_self, k_patches, index)[:2]
    for name, x in list(tensors.items())[:3]:
        if x.shape[0] not in (1, images) or x.shape[1] not in (1, states):
            rule = f"{name} must have {images} (or 1) images of {states} (or 1) states"
            got, remedy = f"{x.shape[0]} of {x.shape[1]}", "give every state a row, or one row for all"
            raise ValueError(message(OP_NAME, rule, got, remedy))
    return (*(with_dense_rows(x) for x in tensors.values()), None if index is None else index.contiguous())


def _check_index(index: Tensor, k_patches: Tensor) -> None:
    if index.dtype != torch.int32:
        raise TypeError(message(OP_NAME, "index must be int32", index.dtype, "call index.int()"))
    if index.dim() != 3 or index.shape[0] != k_patches.shape[0]:
        rule = f"index must be [{k_patches.shape[0]} images, states, k]"
        raise ValueError(message(OP_NAME, rule, f"shape {tuple(index.shape)}", "give every image its own table"))


def _too_wide(q: Tensor) -> str | None:
    return f"heads of width {q.shape[3]} exceed the {MAX_WIDTH} of its registers" if q.shape[3] > MAX_WIDTH else None


def _too_far_apart(*tensors: Tensor) -> str | None:
    most = max(x.stride(1) * x.dtype.itemsize for x in tensors)
    return f"rows that are {most} bytes apart overflow its 32-bit offsets" if most >= 2**31 else None


def _too_many_rows(q: Tensor, k_self: Tensor, v_self: Tensor, k_patches: Tensor, index: Tensor | None) -> str | None:
    """A block computes at least one state or patch of a head."""
    images, states, heads, _ = state_shape(q, k_self, v_self, k_patches, index)
    return hardware.grid_too_large(images * heads * max(states, k_patches.shape[1]))


def _cuda_unsupported(q, k_self, v_self, k_patches, v_patches, index) -> str | None:
    many = index is not None and k_patches.shape[1] > MAX_PATCHES
    return first_reason(
        hardware.unsupported_by_all(q.dtype, q, k_patches, index),
        _too_wide(q),
        f"{k_patches.shape[1]} patches exceed the {MAX_PATCHES} of its inverse table" if many else None,
        hardware.no_cuda_library(q, "class_attention_fwd"),
    ) or first_reason(
        _too_far_apart(q, k_self, v_self, k_patches, v_patches),
        _too_many_rows(q, k_self, v_self, k_patches, index),
    )


def _triton_unsupported(q, k_self, v_self, k_patches, v_patches, index) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(q.dtype, q, k_patches, index), _too_wide(q), hardware.no_triton(q)
    ) or _too_many_rows(q, k_self, v_self, k_patches, index)


def _cpp_unsupported(q, k_self, v_self, k_patches, v_patches, index) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(q.dtype, q, k_patches, index), hardware.no_cpu_library(q, "class_attention_fwd")
    )


def _size(q, k_self, v_self, k_patches, v_patches, index) -> str:
    return "all patches" if index is None else "selected patches"


# Every `bwd` gives q, k_self and v_self a gradient per state; `_run_bwd` sums those of states that share a row.
OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        Impl("cuda", native_call("class_attention_fwd"), _cuda_unsupported, native_call("class_attention_bwd")),
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", native_call("class_attention_fwd"), _cpp_unsupported, native_call("class_attention_bwd")),
        Impl(
            "triton",
            triton_call(__package__, "class_attention_fwd"),
            _triton_unsupported,
            triton_call(__package__, "class_attention_bwd"),
        ),
        Impl("reference", reference.class_attention_fwd, lambda *args: None, reference.class_attention_bwd),
    ),
    size=_size,
)


def _run_bwd(grad: Tensor, *args_and_lse) -> tuple[Tensor, ...]:
    *args, lse = args_and_lse
    *own, dk_patches, dv_patches = OP.choose(*args, direction="backward").bwd(with_dense_rows(grad), *args, lse)
    own = [_summed(gradient, x) for gradient, x in zip(own, args[:3], strict=True)]
    return (*own, dk_patches, dv_patches)


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient [M, Q, H, E] in the shape of x, summed over its sizes of 1."""
    shared = [dim for dim in (0, 1) if gradient.shape[dim] != x.shape[dim]]
    return gradient.sum(dim=shared, keepdim=True).to(x.dtype) if shared else gradient


def _fake_fwd(q, k_self, v_self, k_patches, v_patches, index) -> tuple[Tensor, Tensor]:
    shape = state_shape(q, k_self, v_self, k_patches, index)
    return q.new_empty(shape), q.new_empty(shape[:-1], dtype=accumulator(q.dtype))


def _fake_bwd(grad, q, k_self, v_self, k_patches, v_patches, index, lse) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k_self, v_self, k_patches, v_patches))


_INPUTS = "Tensor q, Tensor k_self, Tensor v_self, Tensor k_patches, Tensor v_patches, Tensor? index"
_fwd = OP.define("fwd", f"({_INPUTS}) -> (Tensor, Tensor)", run=OP.forward, fake=_fake_fwd)
_bwd = OP.define(
    "bwd",
    f"(Tensor grad, {_INPUTS}, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_bwd,
    fake=_fake_bwd,
)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor | None) -> tuple:
    return (*_bwd(grad, *ctx.saved_tensors), None)


OP.differentiate(_setup_context, _backward)


def class_attention(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_patches: Tensor,
    v_patches: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """Lets every state attend to itself and to patches: to the few that `index` names, or to all of its image.

    out = sum_j w_j v_j with w = softmax_j(q . k_j E^-0.5), where j runs over the state itself and the patches it reads:
    class attention (CaiT), as SelfPatch's aggregation head runs it for one summary per image and for every patch.

    Args:
        q, k_self, v_self: [M or 1, Q or 1, H, E] a state's query, and its own key and value; a size of 1 stands for all.
        k_patches, v_patches: [M, N, H, E] the patches, projected once however many states read them; any outer strides,
            so that slices of one packed projection need no copy.
        index: [M, Q, k] int32, the patches that each state reads; -1 (or anything outside 0..N-1) reads nothing, a patch
            named twice counts twice. None: every state reads all N patches, fast for few states per image.

    Returns:
        [M, Q, H, E] in the dtype of q. A state that reads no patch returns its own value.

    fp32, bf16 or fp16 (fp64 runs the reference); sums and the softmax are fp32. Differentiable in all five tensors; the
    backward computes the weights again from one saved fp32 number per state and head, and no sum depends on an order of
    execution. Traffic: each of the five tensors read once, the output written once; the backward reads the five and the
    upstream gradient, and writes five. No copy per neighbor exists in memory.
    """
    return _fwd(*_bind(q, k_self, v_self, k_patches, v_patches, index))[0]
