"""query_attention: raw tokens attend to raw tokens, queries to raw tokens and queries, from one packed projection (PQCL)."""

from __future__ import annotations

from torch import Tensor

from ... import hardware
from ...arguments import accumulator, check_dtype, check_integer, check_required, message, with_dense_rows
from ...dispatch import Impl, Op, first_reason, triton_call
from ...extension import native_call
from . import reference, torch_attention

OP_NAME = "query_attention"
CUDA_WIDTH, TRITON_WIDTH = 64, 128
QUERY_KEYS = ("all", "raw")


def _bind(qkv: Tensor, raw: int, query_keys: str = "all", crop: int | None = None) -> tuple:
    """Checks the public arguments and returns those that implementations take.

    In those, `crop` is the number of queries that read one another; 0: none.
    """
    check_required(OP_NAME, qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        rule, got = "qkv must be [images, tokens, 3, heads, width]", f"shape {tuple(qkv.shape)}"
        raise ValueError(message(OP_NAME, rule, got, "unflatten the projection"))
    check_dtype(OP_NAME, "qkv", qkv.dtype)
    check_integer(OP_NAME, "raw", raw, "count the raw tokens")
    tokens = qkv.shape[1]
    if not 1 <= raw <= tokens:
        rule = f"raw must be between 1 and the {tokens} tokens"
        raise ValueError(message(OP_NAME, rule, raw, "queries come behind raw tokens"))
    if query_keys not in QUERY_KEYS:
        rule = f"query_keys must be one of {QUERY_KEYS}"
        raise ValueError(message(OP_NAME, rule, repr(query_keys), "choose one"))
    if crop is not None:
        _check_crop(crop, tokens - raw, query_keys)
    queries_together = 0 if query_keys == "raw" else tokens - raw if crop is None else crop
    return with_dense_rows(qkv), raw, queries_together


def _check_crop(crop: int, queries: int, query_keys: str) -> None:
    check_integer(OP_NAME, "crop", crop, "convert it, or leave it out")
    if query_keys == "raw":
        rule = "crop must be None where queries read raw keys only"
        raise ValueError(message(OP_NAME, rule, crop, "use query_keys='all'"))
    if crop < 1 or queries % crop:
        rule = f"crop must be positive and divide the {queries} queries"
        raise ValueError(message(OP_NAME, rule, crop, "give whole crops"))


def _too_wide(qkv: Tensor, limit: int) -> str | None:
    return f"heads of width {qkv.shape[4]} exceed the {limit} of its tiles" if qkv.shape[4] > limit else None


def _blocks(qkv: Tensor, raw: int, crop: int, rows: int) -> int:
    """Blocks of `rows` rows of one head: raw tokens and each crop of queries have their own."""
    queries = qkv.shape[1] - raw
    each = crop or queries
    return -(-raw // rows) + (queries // each * -(-each // rows) if each else 0)


def _cuda_unsupported(qkv: Tensor, raw: int, crop: int) -> str | None:
    reason = first_reason(
        hardware.unsupported_by_all(qkv.dtype, qkv),
        _too_wide(qkv, CUDA_WIDTH),
        hardware.no_cuda_library(qkv, "query_attention_fwd"),
    )
    images, tokens, _, heads, _ = qkv.shape
    return reason or hardware.grid_too_large(images * max(heads, tokens), _blocks(qkv, raw, crop, 64))


def _triton_unsupported(qkv: Tensor, raw: int, crop: int) -> str | None:
    reason = first_reason(
        hardware.unsupported_by_all(qkv.dtype, qkv), _too_wide(qkv, TRITON_WIDTH), hardware.no_triton(qkv)
    )
    return reason or hardware.grid_too_large(qkv.shape[0] * qkv.shape[3] * _blocks(qkv, raw, crop, 16))


def _cpp_unsupported(qkv: Tensor, raw: int, crop: int) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(qkv.dtype, qkv), hardware.no_cpu_library(qkv, "query_attention_fwd")
    )


def _torch_unsupported(qkv: Tensor, raw: int, crop: int) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(qkv.dtype, qkv),
        torch_attention.no_flash_attention(qkv),
        torch_attention.several_crops(qkv, raw, crop),
    )


def _size(qkv: Tensor, raw: int, crop: int) -> str:
    return "64 tokens or more" if qkv.shape[1] >= 64 else "fewer than 64 tokens"


OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        Impl("cpp", native_call("query_attention_fwd"), _cpp_unsupported, native_call("query_attention_bwd")),
        # Before our own on a GPU by prediction (README). Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("torch", torch_attention.query_attention_fwd, _torch_unsupported, torch_attention.query_attention_bwd),
        Impl("cuda", native_call("query_attention_fwd"), _cuda_unsupported, native_call("query_attention_bwd")),
        Impl(
            "triton",
            triton_call(__package__, "query_attention_fwd"),
            _triton_unsupported,
            triton_call(__package__, "query_attention_bwd"),
        ),
        Impl("reference", reference.query_attention_fwd, lambda *args: None, reference.query_attention_bwd),
    ),
    size=_size,
)


def _run_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, raw: int, crop: int) -> Tensor:
    chosen = OP.choose(qkv, raw, crop, direction="backward")
    return chosen.bwd(with_dense_rows(grad), qkv, out, lse, raw, crop)


def _fake_fwd(qkv: Tensor, raw: int, crop: int) -> tuple[Tensor, Tensor]:
    images, tokens, _, heads, width = qkv.shape
    lse = qkv.new_empty((images, heads, tokens), dtype=accumulator(qkv.dtype))
    return qkv.new_empty((images, tokens, heads, width)), lse


def _fake_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, raw: int, crop: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


_fwd = OP.define("fwd", "(Tensor qkv, SymInt raw, SymInt crop) -> (Tensor, Tensor)", run=OP.forward, fake=_fake_fwd)
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

    out = softmax(q k^T E^-0.5) v per head: PQCL's attention, in which queries read an image and do not change it.

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
    qkv, in one tensor, and no sum depends on an order of execution. What a token does not read, even a NaN, does not
    change it. Traffic: qkv read once, the output and one fp32 number per token and head written once; the backward reads these
    and the upstream gradient and writes one gradient. No attention map exists in memory.
    """
    return _fwd(*_bind(qkv, raw, query_keys, crop))[0]
