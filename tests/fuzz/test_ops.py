"""Random arguments of every op, right and wrong: every implementation gives the reference's result, or the same sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from parity import HAS_GPU, assert_as_exact_as_pytorch, outcome, reason_against, running, widened
from rounds import fuzz
from torch import Tensor

from patchlight_kernels import extension, force, registry
from patchlight_kernels.registry import Case, OpSpec

SPECS = registry.specs()
SENTENCE = re.compile(r"^\w+: .+, got .+; .+\.$", re.DOTALL)
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 32, 33, 37, 64, 65)
WEIGHTS = ("pair_weight", "row_weight", "weight", "bias", "table", "scale", "steps")  # tensors that are not features
FEATURES = ("class_attention", "query_attention")  # ops whose result has a layout, and so has its gradient
FACTORS = {
    torch.float16: (1e2, 1e-7),
    torch.bfloat16: (1e10, 1e18, 1e-30),
    torch.float32: (1e10, 1e18, 1e-42),
}

Draws = np.random.Generator


def pick(draws: Draws, choices: Any) -> Any:
    return choices[draws.integers(len(choices))]


def size(draws: Draws, most: int = 65, least: int = 0) -> int:
    return pick(draws, [size for size in SIZES if least <= size <= most])


def grid(draws: Draws) -> tuple[int, int]:
    return size(draws, 8, 1), size(draws, 8, 1)


def class_attention_sizes(draws: Draws) -> dict[str, Any]:
    k = pick(draws, (None, 0, 1, 2, 5, 9))
    shared = pick(draws, ("", "", "state", "image", "state and image", "mixed"))
    found = {"images": size(draws, 3), "patches": size(draws), "states": size(draws, 33), "heads": size(draws, 3)}
    if k is None and shared in ("state and image", "mixed"):  # nothing would say how many states there are
        shared = "state"
    return found | {"width": size(draws), "k": k, "shared": shared, "grid": None}


def query_attention_sizes(draws: Draws) -> dict[str, Any]:
    keys = pick(draws, ("all", "raw"))
    crop = pick(draws, (None, 1, 3, 8)) if keys == "all" else None
    queries = size(draws, 33) if crop is None else crop * size(draws, 5)
    found = {"images": size(draws, 3), "raw": size(draws, 65, 1), "queries": queries, "heads": size(draws, 3)}
    return found | {"width": size(draws), "query_keys": keys, "crop": crop}


def neighbor_topk_sizes(draws: Draws) -> dict[str, Any]:
    radius, border = pick(draws, (None, 1, 1, 2, 3, 2**30)), pick(draws, ("wrap", "clip"))
    found = {"images": size(draws, 3), "grid": grid(draws), "channels": size(draws), "radius": radius, "border": border}
    return found | {"k": size(draws, 33, 1)}


def prototype_ce_sizes(draws: Draws) -> dict[str, Any]:
    found = {"students": size(draws, 5), "teachers": size(draws, 3), "rows": size(draws), "width": size(draws)}
    how = {"bias": pick(draws, (True, False)), "equal": False, "on_device": pick(draws, (True, False))}
    return found | how | {"prototypes": pick(draws, (1, 2, 31, 64, 65, 130)), "products": None}


def self_relation_sizes(draws: Draws) -> dict[str, Any]:
    found = {"views": size(draws, 3), "images": size(draws, 3), "heads": size(draws, 2), "rows": size(draws)}
    return found | {"width": size(draws), "teacher_width": size(draws), "transposed": pick(draws, (True, False))}


def list_sizes(draws: Draws) -> tuple[int, ...]:
    return tuple(pick(draws, (0, 1, 3, 64, 1023, 4096, 4097, 9000)) for _ in range(draws.integers(1, 7)))


SIZES_OF: dict[str, Callable[[Draws], dict[str, Any]]] = {
    "adamw": lambda draws: {
        "sizes": list_sizes(draws),
        "refused": pick(draws, (0.0, 0.0, 1.0)),
        "freeze": pick(draws, (0.0, 1.0)),
        "copies": pick(draws, (True, False)),
    },
    "block_masks": lambda draws: {
        "views": size(draws, 5, 1),
        "batch": size(draws, 17),
        "grid": grid(draws),
        "shape": pick(draws, ("block", "random")),
    },
    "class_attention": class_attention_sizes,
    "neighbor_topk": neighbor_topk_sizes,
    "photometric": lambda draws: {
        "samples": size(draws, 5),
        "height": size(draws),
        "width": size(draws),
        "blur": pick(draws, (0.0, 0.5, 1.0)),
    },
    "prototype_ce": prototype_ce_sizes,
    "query_attention": query_attention_sizes,
    "self_relation": self_relation_sizes,
    "square_sums": lambda draws: {"sizes": list_sizes(draws)},
}


def relaid(draws: Draws, x: Tensor) -> Tensor:
    """The same values in another layout, or the first along a dimension in all of its places."""
    how = pick(draws, ("dense", "transposed", "expanded", "stepped", "offset", "behind"))
    if how == "dense" or not x.dim():
        return x
    dim, other = int(draws.integers(x.dim())), int(draws.integers(x.dim()))
    if how == "transposed":
        return x.transpose(dim, other).contiguous().transpose(dim, other)
    if how == "expanded":
        return x.narrow(dim, 0, min(1, x.shape[dim])).expand(x.shape)
    if how == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    step = 2 if how == "stepped" else 1
    shape = list(x.shape)
    shape[dim] = step * shape[dim] + 1
    # What lies between and before the values must not be read.
    room = torch.full(shape, torch.nan if x.is_floating_point() else 77, dtype=x.dtype)
    view = room[(slice(None),) * dim + (slice(1, None, step),)]
    return view.copy_(x)


def spoiled(draws: Draws, arguments: dict[str, Any]) -> dict[str, Any]:
    """One argument is of another kind, dtype, size or value; that may still be right."""
    name = pick(draws, list(arguments))
    value = arguments[name]
    if not isinstance(value, Tensor):
        return arguments | {
            name: pick(draws, (None, 0, -1, 2**40, True, 1.5, np.int64(2), "x", (1, 2), torch.tensor(1)))
        }
    how = pick(draws, ("dtype", "deeper", "shallower", "shorter", "longer", "kind"))
    dim = int(draws.integers(max(1, value.dim())))
    if how == "dtype":
        value = value.to(pick(draws, (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)))
    elif how == "deeper":
        value = value[None]
    elif how == "shallower" and value.dim() and value.shape[0]:
        value = value[0]
    elif how == "shorter" and value.dim() and value.shape[dim]:
        value = value.narrow(dim, 0, value.shape[dim] - 1)
    elif how == "longer" and value.dim():
        value = torch.cat([value, value.narrow(dim, 0, min(1, value.shape[dim]))], dim)
    elif how == "kind":
        return arguments | {name: pick(draws, (None, 3, [1.0], np.zeros(tuple(value.shape), np.float32)))}
    return arguments | {name: value}


def extreme(draws: Draws, arguments: dict[str, Any]) -> dict[str, Any]:
    """Features times a large or tiny factor, all of them or those of one tensor."""
    features = [n for n, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point() and n not in WEIGHTS]
    features = [name for name in features if arguments[name].dim() and arguments[name].dtype in FACTORS]
    chosen = features if draws.random() < 0.5 or not features else [pick(draws, features)]
    if not chosen:
        return arguments
    factor = pick(draws, FACTORS[arguments[chosen[0]].dtype])
    return arguments | {name: arguments[name] * factor for name in chosen}


def with_gradients(draws: Draws, spec: OpSpec) -> OpSpec:
    """The op with gradients of some of its arguments; of a feature op perhaps from an upstream gradient that is not dense."""
    spec = replace(spec, differentiable=tuple(n for n in spec.differentiable if draws.random() < 0.7))
    if spec.name not in FEATURES or draws.random() < 0.5:
        return spec
    public, saved = spec.public, spec.saved_sums
    assert saved is not None
    if draws.random() < 0.5:
        return replace(
            spec,
            public=lambda **given: public(**given).transpose(1, 2),
            saved_sums=lambda given: saved(given).transpose(1, 2),
        )
    return replace(spec, public=lambda **given: public(**given).sum(-1, keepdim=True))


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def refusal(spec: OpSpec, arguments: dict[str, Any]) -> str | None:
    """What the op says against the arguments. Nothing else may be raised."""
    try:
        spec.public(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def assert_finite_where_pytorch_is(
    spec: OpSpec, arguments: dict[str, Any], result: dict[str, Tensor], dtype: torch.dtype, label: str
) -> None:
    with force("reference"):
        eager, exact = outcome(spec, arguments), outcome(spec, widened(arguments))
    for key, value in result.items():
        fits = eager[key].isfinite() & (exact[key].abs() < 0.9 * torch.finfo(dtype).max)
        assert value[fits].isfinite().all(), f"{label} {key}"


def implementations(draws: Draws) -> list[str]:
    """C++, and sometimes one that is slow on a CPU."""
    slow = pick(draws, ("", "", "cuda") if HAS_GPU else ("", "", "cuda", "cuda", "triton"))
    return (["cpp"] if extension.missing("cpp") is None else []) + ([slow] if slow else [])


def attempt(draws: Draws) -> None:
    spec = pick(draws, SPECS)
    dtype = pick(draws, (torch.float32, torch.bfloat16, torch.float16))
    arguments = spec.inputs(Case("fuzz", SIZES_OF[spec.name](draws)), dtype, "cpu", int(draws.integers(1000)))
    lists = spec.name in ("adamw", "square_sums")
    kind = pick(draws, ("usual", "usual", "extreme", "spoiled"))
    if not lists:
        arguments = {key: relaid(draws, x) if isinstance(x, Tensor) else x for key, x in arguments.items()}
    if kind == "spoiled" and not lists:
        arguments = spoiled(draws, arguments)
    if kind == "extreme":
        arguments = extreme(draws, arguments)
    with force("reference"):
        said = refusal(spec, arguments)
    assert said is None or SENTENCE.match(said), said
    spec = with_gradients(draws, spec)
    for name in implementations(draws):
        label = f"{name}, {spec.name}, {kind}"
        with running("cpu", name), unwritten_memory_is_nan():
            if said is None and reason_against(spec, name, arguments):
                continue
            if said is not None:
                assert refusal(spec, arguments) == said, label
                continue
            result = outcome(spec, arguments)
        if kind == "extreme":
            assert_finite_where_pytorch_is(spec, arguments, result, dtype, label)
        else:
            assert_as_exact_as_pytorch(spec, arguments, result, label)


def test_random_arguments():
    fuzz(attempt)
