"""query_attention: raw tokens attend raw tokens, query tokens attend raw and query tokens, from one packed projection (PQCL)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension, hardware
from ...dispatch import Impl, Op, first_reason
from . import reference
from .reference import accumulator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_WIDTH, TRITON_WIDTH = 64, 128
QUERY_KEYS = ("all", "raw")


def _bind(qkv: Tensor, raw: int, query_keys: str = "all", crop: int | None = None) -> tuple:
    """Checks the public arguments and returns the raw ones: there `crop` says how many queries read one another, 0: none."""
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"query_attention: qkv must be [images, tokens, 3, heads, width], got shape {tuple(qkv.shape)}; "
            "unflatten the projection"
        )
    if qkv.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"query_attention: qkv must be float32, bfloat16, float16 or float64, got {qkv.dtype}; cast it")
    if isinstance(raw, bool) or not isinstance(raw, (int, torch.SymInt)):
        raise TypeError(
            f"query_attention: raw must be a Python integer, got {type(raw).__name__}; count the raw tokens"
        )
    tokens = qkv.shape[1]
    if not 1 <= raw <= tokens:
        raise ValueError(
            f"query_attention: raw must be between 1 and the {tokens} tokens, got {raw}; queries come behind raw tokens"
        )
    if query_keys not in QUERY_KEYS:
        raise ValueError(f"query_attention: query_keys must be one of {QUERY_KEYS}, got {query_keys!r}; choose one")
    if crop is not None:
        _check_crop(crop, tokens - raw, query_keys)
    reach = 0 if query_keys == "raw" else tokens - raw if crop is None else crop
    dense = qkv.shape[4] <= 1 or qkv.stride(4) == 1
    return qkv if dense else qkv.contiguous(), raw, reach


def _check_crop(crop: int, queries: int, query_keys: str) -> None:
    if isinstance(crop, bool) or not isinstance(crop, (int, torch.SymInt)):
        raise TypeError(
            f"query_attention: crop must be a Python integer or None, got {type(crop).__name__}; convert it"
        )
    if query_keys == "raw":
        raise ValueError(
            f"query_attention: crop must be None where queries read raw keys only, got {crop}; use query_keys='all'"
        )
    if crop < 1 or queries % crop:
        raise ValueError(
            f"query_attention: crop must be positive and divide the {queries} queries, got {crop}; give whole crops"
        )


def _unfit(qkv: Tensor) -> str | None:
    """What no fast implementation takes."""
    return first_reason(
        "float64 features run the reference only" if qkv.dtype not in DTYPES else None,
        "there is nothing to compute" if qkv.numel() == 0 else None,
    )


def _cuda_unsupported(qkv: Tensor, raw: int, crop: int) -> str | None:
    wide = f"heads of width {qkv.shape[4]} exceed the {CUDA_WIDTH} of its tiles"
    library = hardware.no_cuda_library(qkv, "query_attention_fwd")
    return first_reason(_unfit(qkv), wide if qkv.shape[4] > CUDA_WIDTH else None, library)


def _triton_unsupported(qkv: Tensor, raw: int, crop: int) -> str | None:
    wide = f"heads of width {qkv.shape[4]} exceed the {TRITON_WIDTH} of its registers"
    return first_reason(_unfit(qkv), wide if qkv.shape[4] > TRITON_WIDTH else None, hardware.no_triton(qkv))


def _cpp_unsupported(qkv: Tensor, raw: int, crop: int) -> str | None:
    return first_reason(_unfit(qkv), hardware.no_cpu_library(qkv, "query_attention_fwd"))


def _native_fwd(*raw) -> tuple[Tensor, Tensor]:
    return extension.native("query_attention_fwd")(*raw)


def _native_bwd(*raw) -> Tensor:
    return extension.native("query_attention_bwd")(*raw)


def _triton_fwd(*raw) -> tuple[Tensor, Tensor]:
    from .triton_kernels import query_attention_fwd  # here, so that a machine without Triton can import the package

    return query_attention_fwd(*raw)


def _triton_bwd(*raw) -> Tensor:
    from .triton_kernels import query_attention_bwd

    return query_attention_bwd(*raw)


OP = Op(
    "query_attention",
    bind=_bind,
    impls=(
        Impl("cuda", _native_fwd, _cuda_unsupported, _native_bwd),
        Impl("cpp", _native_fwd, _cpp_unsupported, _native_bwd),  # on CPUs only, where Triton could but be interpreted
        Impl("triton", _triton_fwd, _triton_unsupported, _triton_bwd),
        Impl("reference", reference.query_attention_fwd, lambda *raw: None, reference.query_attention_bwd),
    ),
)


def _run_fwd(*raw) -> tuple[Tensor, Tensor]:
    return OP.choose(*raw).fwd(*raw)


def _run_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, raw: int, crop: int) -> Tensor:
    dense = grad.shape[3] <= 1 or grad.stride(3) == 1
    return OP.choose(qkv, raw, crop).bwd(grad if dense else grad.contiguous(), qkv, out, lse, raw, crop)


def _fake_fwd(qkv: Tensor, raw: int, crop: int) -> tuple[Tensor, Tensor]:
    images, tokens, _, heads, width = qkv.shape
    lse = qkv.new_empty((images, heads, tokens), dtype=accumulator(qkv.dtype))
    return qkv.new_empty((images, tokens, heads, width)), lse


def _fake_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, raw: int, crop: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


_fwd = OP.define("fwd", "(Tensor qkv, SymInt raw, SymInt crop) -> (Tensor, Tensor)", run=_run_fwd, fake=_fake_fwd)
_bwd = OP.define(
    "bwd",
    "(Tensor grad, Tensor qkv, Tensor out, Tensor lse, SymInt raw, SymInt crop) -> Tensor",
    run=_run_bwd,
    fake=_fake_bwd,
)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.raw, ctx.crop = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    return _bwd(grad, *ctx.saved_tensors, ctx.raw, ctx.crop), None, None


OP.differentiate(_setup_context, _backward)


def query_attention(qkv: Tensor, raw: int, query_keys: str = "all", crop: int | None = None) -> Tensor:
    """Lets raw tokens attend to raw tokens, and query tokens to raw and query tokens, in one pass over packed projections.

    out = softmax(q k^T E^-0.5) v per head: PQCL's attention, in which queries learn from an image and leave it as it is.

    Args:
        qkv: [M, T, 3, H, E] the projections of T tokens, the first `raw` of them raw (class token and patches), the others
            queries; any strides with dense E, so the output of the qkv product needs no copy.
        raw: how many tokens are raw, at least 1; T (no queries) is plain self-attention.
        query_keys: "all", as released: queries read raw tokens, themselves and their siblings; "raw": raw tokens only,
            the narrow reading of the paper's equation 6.
        crop: with "all", how many queries make one query crop; a query reads raw tokens and its own crop. None, as
            released: all queries read one another.

    Returns:
        [M, T, H, E] in the order of the tokens and the dtype of qkv.

    fp32, bf16 or fp16 (fp64 runs the reference); softmax and sums are fp32. Differentiable; the gradient is packed like
    qkv, in one tensor, and no sum depends on an order of execution. What a token does not read, be it NaN, does not reach
    it. Traffic: qkv read once, the output and one fp32 number per token and head written once; the backward reads these
    and the upstream gradient and writes one gradient. No attention map exists in memory.
    """
    return _fwd(*_bind(qkv, raw, query_keys, crop))[0]
