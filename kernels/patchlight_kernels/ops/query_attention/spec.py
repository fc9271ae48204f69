"""Cases, inputs and costs of query_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...registry import Case, OpSpec, first_images, generator
from .op import OP, query_attention


def _case(
    images: int,
    raw: int,
    queries: int,
    heads: int,
    width: int,
    query_keys: str = "all",
    crop: int | None = None,
    **more: Any,
) -> Case:
    reads = "" if query_keys == "all" and crop is None else f"-{query_keys}" if crop is None else f"-crop{crop}"
    sizes = {"images": images, "raw": raw, "queries": queries, "heads": heads, "width": width}
    name = f"M{images}-{raw}+{queries}-H{heads}-E{width}{reads}"
    return Case(name, {**sizes, "query_keys": query_keys, "crop": crop}, **more)


TESTS = (
    _case(1, 2, 2, 1, 2),
    _case(2, 7, 5, 2, 16),
    _case(1, 5, 6, 2, 8, crop=3),
    _case(1, 5, 3, 1, 24, "raw"),
    _case(2, 3, 2, 1, 37),  # a prime width: rows are not aligned
    _case(1, 13, 0, 2, 8),  # no queries: plain self-attention
    _case(1, 1, 1, 1, 1),
    _case(1, 1, 6, 1, 20, crop=1),  # every query a crop of its own
    _case(1, 37, 4, 1, 64),
    _case(1, 70, 19, 1, 16),  # more rows than a block takes at once
    _case(1, 33, 34, 1, 72, crop=17),  # wider than one 128-byte chunk
    _case(1, 250, 18, 1, 8, crop=9),  # more keys than one tile holds
    _case(0, 5, 3, 1, 8),  # no images
    _case(2, 5, 3, 0, 8),  # no heads
    _case(1, 5, 3, 1, 0),  # no width
)

BENCHES = (
    _case(16, 197, 36, 6, 64, small=True),
    _case(16, 197, 0, 6, 64, small=True),
    _case(64, 37, 4, 6, 64, small=True),
    _case(16, 197, 36, 6, 64, "raw", small=True),
    _case(128, 197, 36, 6, 64),
    _case(512, 197, 36, 6, 64),
    _case(128, 197, 36, 12, 64),
    _case(128, 197, 144, 6, 64, crop=36),
    _case(64, 785, 36, 6, 64),
)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    s = case.sizes
    draws = generator(seed, s["raw"], s["width"])
    qkv = torch.randn(s["images"], s["raw"] + s["queries"], 3, s["heads"], s["width"], generator=draws)
    return {"qkv": qkv.to(device, dtype), "raw": s["raw"], "query_keys": s["query_keys"], "crop": s["crop"]}


def _saved_sums(arguments: dict[str, Any]) -> Tensor:
    return torch.ops.patchlight.query_attention_fwd(*OP.bind(**arguments))[1].transpose(1, 2)[..., None]


def _min_bytes(case: Case, dtype: torch.dtype) -> int:
    """Projections read once, the output written once."""
    s = case.sizes
    return 4 * s["images"] * (s["raw"] + s["queries"]) * s["heads"] * s["width"] * dtype.itemsize


def _flops(case: Case) -> int:
    """A product with each key that a token reads, and one with each value."""
    s = case.sizes
    own = 0 if s["query_keys"] == "raw" else s["crop"] or s["queries"]
    pairs = s["raw"] ** 2 + s["queries"] * (s["raw"] + own)
    return 4 * s["images"] * s["heads"] * s["width"] * pairs


SPEC = OpSpec(
    op=OP,
    public=query_attention,
    tests=TESTS,
    benches=BENCHES,
    inputs=_inputs,
    min_bytes=_min_bytes,
    flops=_flops,
    differentiable=("qkv",),
    saved_sums=_saved_sums,
    sample=first_images(4, "qkv"),
)
