"""Cases, inputs and costs of adamw. A case has all values of a list in one tensor; the call works on copies of its parts.

The copies are in the time that `python -m bench ops` measures; `python -m bench update` measures the op in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...registry import Case, OpSpec, generator
from .op import OP, adamw

STATE = ("parameter", "exp_avg", "exp_avg_sq", "teacher", "copy", "teacher_copy")  # with all values of a list each
VIT = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12)}  # width, depth


def _case(name: str, *sizes: int, refused: float = 0.0, freeze: float = 0.0, copies: bool = True, **more: Any) -> Case:
    return Case(name, {"sizes": sizes, "refused": refused, "freeze": freeze, "copies": copies}, **more)


def network(width: int, depth: int) -> tuple[int, ...]:
    """About as many values as the parameters of a vision transformer with a projection head have."""
    block = (3 * width**2, 3 * width, width**2, width, 4 * width**2, 4 * width, 4 * width**2, *[width] * 5)
    return (768 * width, 197 * width, width, *block * depth, 2048 * width, 2048, 2048**2, 2048, 2048 * 256, 256)


TESTS = (
    _case("one-value", 1),
    _case("odd", 5, 4097, 1, 0, 384, 9000),  # several chunks, one value more than a chunk, none
    _case("frozen", 4096, 3, 70, 0, 8192, 11, freeze=1.0),
    _case("refused", 12, 5000, refused=1.0),
    _case("refused-and-frozen", 12, 5000, 8, refused=1.0, freeze=1.0),
    _case("no-copies", 33, 4100, 64, copies=False),
    _case("all-empty", 0, 0),
    _case("many", *range(1, 140)),
)

BENCHES = tuple(_case(f"vit-{name}", *network(*size), small=name == "tiny") for name, size in VIT.items())


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Every third parameter has no teacher, every fourth may be frozen, every fifth has no gradient, every other decays."""
    s = case.sizes
    sizes, count, total = s["sizes"], len(s["sizes"]), sum(s["sizes"])
    draws = generator(seed, count, total)
    normal = lambda size: torch.randn(total, generator=draws) * size
    parameter = normal(1.0)
    found: dict[str, Any] = {
        "parameter": parameter,
        "gradient": normal(1.0),
        "exp_avg": normal(0.1),
        "exp_avg_sq": normal(0.1).square(),
        "teacher": parameter + normal(0.1),
        "steps": torch.randint(0, 200, (count,), generator=draws).float(),
        "scale": torch.rand(count, generator=draws),
        "refused": torch.tensor(s["refused"]),
    }
    numbers = {"lr": 1e-2, "weight_decay": 0.4, "momentum": 0.9, "freeze": s["freeze"]}
    found |= {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    for name in ("copy", "teacher_copy"):
        found[name] = torch.zeros(total if s["copies"] else 0, dtype=half)
    found = {name: value.to(device) for name, value in found.items()}
    return found | {"gradient": found["gradient"].to(dtype), "sizes": sizes}


def own_values(values: Tensor, first: int, count: int) -> Tensor:
    """A copy of some of the values. Inductor (torch 2.14) forgets where a slice begins if an op changes its copy."""
    if torch.compiler.is_compiling():
        return values[torch.arange(first, first + count, device=values.device)]
    return values[first : first + count].clone()


def _unpack(arguments: dict[str, Any]) -> dict[str, Any]:
    """The public arguments, with tensors of their own."""
    sizes = arguments["sizes"]
    every = range(len(sizes))

    def parts(name: str, without: Sequence[int] = ()) -> list[Tensor]:
        values, ends = arguments[name], list(accumulate(sizes))
        split = [own_values(values, end - size, size) for size, end in zip(sizes, ends, strict=True)]
        return [values.new_empty(0) if number in without else part for number, part in enumerate(split)]

    return {
        "parameters": parts("parameter"),
        "gradients": [None if number % 5 == 4 else part for number, part in enumerate(parts("gradient"))],
        "exp_avgs": parts("exp_avg"),
        "exp_avg_sqs": parts("exp_avg_sq"),
        "steps": arguments["steps"].clone(),
        "decayed": [number % 2 == 0 for number in every],
        "frozen": [number % 4 == 1 for number in every],
        "teachers": parts("teacher", every[2::3]),
        "copies": parts("copy") if arguments["copy"].numel() else [],
        "teacher_copies": parts("teacher_copy", every[2::3]) if arguments["teacher_copy"].numel() else [],
        **{name: arguments[name] for name in ("scale", "lr", "weight_decay", "momentum", "freeze", "refused")},
    }


@wraps(adamw)
def _on_copies(**arguments: Any) -> tuple[Tensor, ...]:
    """Everything that the call changes, after it."""
    given = _unpack(arguments)
    adamw(**given)
    lists = (given["parameters"], given["exp_avgs"], given["exp_avg_sqs"], given["teachers"])
    copies = [tensors for tensors in (given["copies"], given["teacher_copies"]) if tensors]
    return (given["steps"], *(torch.cat(tensors) for tensors in (*lists, *copies)))


def _observe(arguments: dict[str, Any], output: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in zip(("steps", *STATE), output, strict=False)}


def _min_bytes(case: Case, dtype: torch.dtype) -> int:
    """Gradients read once; parameters, both moments and the teacher read and written; two copies written."""
    return sum(case.sizes["sizes"]) * (dtype.itemsize + 4 * 8 + 2 * 2)


SPEC = OpSpec(
    op=OP,
    public=_on_copies,
    tests=TESTS,
    benches=BENCHES,
    inputs=_inputs,
    unpack=_unpack,
    min_bytes=_min_bytes,
    flops=lambda case: 20 * sum(case.sizes["sizes"]),
    observe=_observe,
)
