"""class_attention: states attend, each to itself and to patches, either a few selected ones or all (SelfPatch's aggregation)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension, hardware
from ...dispatch import Impl, Op, first_reason
from . import reference
from .reference import accumulator, state_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256  # a head's row that the GPU kernels hold in registers
MAX_PATCHES = 24576  # counters of the inverse table that 96 KiB of shared memory hold


def _bind(
    q: Tensor, k_self: Tensor, v_self: Tensor, k_patches: Tensor, v_patches: Tensor, index: Tensor | None = None
) -> tuple:
    """Checks the public arguments and returns the raw ones."""
    tensors = {"q": q, "k_self": k_self, "v_self": v_self, "k_patches": k_patches, "v_patches": v_patches}
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(
                f"class_attention: {name} must be [images, rows, heads, width], got shape {tuple(x.shape)}; reshape it"
            )
        if x.dtype not in (*DTYPES, torch.float64):
            raise TypeError(
                f"class_attention: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}; cast it"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"class_attention: all tensors share one dtype, got {q.dtype} and {x.dtype}; cast {name}")
        if x.shape[2:] != q.shape[2:]:
            raise ValueError(
                f"class_attention: heads and width must agree, q has {tuple(q.shape[2:])} and {name} {tuple(x.shape[2:])}"
            )
    if k_patches.shape != v_patches.shape:
        raise ValueError(
            f"class_attention: every key needs its value, got k_patches {tuple(k_patches.shape)} and "
            f"v_patches {tuple(v_patches.shape)}; project the same patches to both"
        )
    if index is not None:
        _check_index(index, k_patches)
    images, states = state_shape(q, k_self, v_self, k_patches, index)[:2]
    for name, x in list(tensors.items())[:3]:
        if x.shape[0] not in (1, images) or x.shape[1] not in (1, states):
            raise ValueError(
                f"class_attention: {name} must have {images} (or 1) images of {states} (or 1) states, "
                f"got {x.shape[0]} of {x.shape[1]}; give every state a row, or one row for all"
            )
    return (*(_with_dense_rows(x) for x in tensors.values()), None if index is None else index.contiguous())


def _check_index(index: Tensor, k_patches: Tensor) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"class_attention: index must be int32, got {index.dtype}; call index.int()")
    if index.dim() != 3 or index.shape[0] != k_patches.shape[0]:
        raise ValueError(
            f"class_attention: index must be [{k_patches.shape[0]} images, states, k], got shape {tuple(index.shape)}; "
            "give every image its own table"
        )


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


def _unfit(q: Tensor, k_patches: Tensor, index: Tensor | None) -> str | None:
    """What no fast implementation takes."""
    empty = q.numel() == 0 or k_patches.numel() == 0 or (index is not None and index.numel() == 0)
    return first_reason(
        "float64 features run the reference only" if q.dtype not in DTYPES else None,
        "there is nothing to read" if empty else None,
    )


def _too_wide(q: Tensor) -> str | None:
    return f"heads of width {q.shape[3]} exceed the {MAX_WIDTH} of its registers" if q.shape[3] > MAX_WIDTH else None


def _cuda_unsupported(q, k_self, v_self, k_patches, v_patches, index) -> str | None:
    many = index is not None and k_patches.shape[1] > MAX_PATCHES
    return first_reason(
        _unfit(q, k_patches, index),
        _too_wide(q),
        f"{k_patches.shape[1]} patches exceed the {MAX_PATCHES} of its inverse table" if many else None,
        hardware.no_cuda_library(q, "class_attention_fwd"),
    )


def _triton_unsupported(q, k_self, v_self, k_patches, v_patches, index) -> str | None:
    return first_reason(_unfit(q, k_patches, index), _too_wide(q), hardware.no_triton(q))


def _cpp_unsupported(q, k_self, v_self, k_patches, v_patches, index) -> str | None:
    return first_reason(_unfit(q, k_patches, index), hardware.no_cpu_library(q, "class_attention_fwd"))


def _native_fwd(*raw) -> tuple[Tensor, ...]:
    return extension.native("class_attention_fwd")(*raw)


def _native_bwd(*raw) -> tuple[Tensor, ...]:
    return extension.native("class_attention_bwd")(*raw)


def _triton_fwd(*raw) -> tuple[Tensor, ...]:
    from .triton_kernels import class_attention_fwd  # here, so that a machine without Triton can import the package

    return class_attention_fwd(*raw)


def _triton_bwd(*raw) -> tuple[Tensor, ...]:
    from .triton_kernels import class_attention_bwd

    return class_attention_bwd(*raw)


# Every `bwd` gives q, k_self and v_self a gradient per state; those that share a row are summed here, in one place.
OP = Op(
    "class_attention",
    bind=_bind,
    impls=(
        Impl("cuda", _native_fwd, _cuda_unsupported, _native_bwd),
        Impl("cpp", _native_fwd, _cpp_unsupported, _native_bwd),  # on CPUs only, where Triton could but be interpreted
        Impl("triton", _triton_fwd, _triton_unsupported, _triton_bwd),
        Impl("reference", reference.class_attention_fwd, lambda *raw: None, reference.class_attention_bwd),
    ),
)


def _run_fwd(*raw) -> tuple[Tensor, Tensor]:
    return OP.choose(*raw).fwd(*raw)


def _run_bwd(grad: Tensor, *raw_and_lse) -> tuple[Tensor, ...]:
    *raw, lse = raw_and_lse
    *own, dk_patches, dv_patches = OP.choose(*raw).bwd(_with_dense_rows(grad), *raw, lse)
    own = (_summed(gradient, x) for gradient, x in zip(own, raw[:3], strict=True))
    return (*own, dk_patches, dv_patches)


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient [M, Q, H, E] in the shape of x, whose sizes of 1 stood for all."""
    shared = [dim for dim in (0, 1) if gradient.shape[dim] != x.shape[dim]]
    return gradient.sum(dim=shared, keepdim=True).to(x.dtype) if shared else gradient


def _fake_fwd(q, k_self, v_self, k_patches, v_patches, index) -> tuple[Tensor, Tensor]:
    shape = state_shape(q, k_self, v_self, k_patches, index)
    return q.new_empty(shape), q.new_empty(shape[:-1], dtype=accumulator(q.dtype))


def _fake_bwd(grad, q, k_self, v_self, k_patches, v_patches, index, lse) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k_self, v_self, k_patches, v_patches))


_INPUTS = "Tensor q, Tensor k_self, Tensor v_self, Tensor k_patches, Tensor v_patches, Tensor? index"
_fwd = OP.define("fwd", f"({_INPUTS}) -> (Tensor, Tensor)", run=_run_fwd, fake=_fake_fwd)
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
            named twice counts twice. None: every state reads all N patches, made for few states per image.

    Returns:
        [M, Q, H, E] in the dtype of q. A state that reads no patch returns its own value.

    fp32, bf16 or fp16 (fp64 runs the reference); sums and the softmax are fp32. Differentiable in all five tensors; the
    backward computes the weights again from one saved fp32 number per state and head, and no sum depends on an order of
    execution. Traffic: each of the five tensors read once, the output written once; the backward reads the five and the
    upstream gradient, and writes five. No copy per neighbor exists in memory.
    """
    return _fwd(*_bind(q, k_self, v_self, k_patches, v_patches, index))[0]
