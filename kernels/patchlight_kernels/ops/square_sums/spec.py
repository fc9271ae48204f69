"""Cases, inputs and costs of square_sums. A case has all values in one tensor, which is split for the call."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...registry import Case, OpSpec, generator
from ..adamw.spec import VIT, network
from .op import OP, square_sums


def _case(name: str, *sizes: int, **more: Any) -> Case:
    return Case(name, {"sizes": sizes}, **more)


TESTS = (
    _case("one-value", 1),
    _case("odd", 5, 4097, 1, 0, 384, 9000),  # several chunks, one value more than a chunk, none
    _case("empty-first", 0, 4096, 3, 70, 0, 8192),  # whole chunks
    _case("all-empty", 0, 0),
    _case("many", *range(1, 140)),  # more tensors than threads of a small block
)

BENCHES = tuple(_case(f"vit-{name}", *network(*size), small=name == "tiny") for name, size in VIT.items())


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    sizes = case.sizes["sizes"]
    values = torch.randn(sum(sizes), generator=generator(seed, len(sizes), 1))
    return {"values": values.to(device, dtype), "sizes": sizes}


def _unpack(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"tensors": list(arguments["values"].split(arguments["sizes"]))}


@wraps(square_sums)
def _of_parts(**arguments: Any) -> Tensor:
    return square_sums(**_unpack(arguments))


SPEC = OpSpec(
    op=OP,
    public=_of_parts,
    tests=TESTS,
    benches=BENCHES,
    inputs=_inputs,
    unpack=_unpack,
    min_bytes=lambda case, dtype: sum(case.sizes["sizes"]) * dtype.itemsize,
    flops=lambda case: 2 * sum(case.sizes["sizes"]),
)
