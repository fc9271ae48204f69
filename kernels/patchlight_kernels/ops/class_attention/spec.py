"""Cases, inputs and costs of class_attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...registry import Case, OpSpec, first_images, generator
from .op import OP, class_attention

STATE = ("q", "k_self", "v_self")
PATCHES = ("k_patches", "v_patches")


def _case(
    images: int,
    patches: int,
    states: int,
    heads: int,
    width: int,
    k: int | None,
    *,
    shared: str = "",
    grid: tuple[int, int] | None = None,
    **more: Any,
) -> Case:
    """`shared` says which sizes of q, k_self, v_self are 1: "state", "image", both, or "mixed"; `grid`: window neighbors."""
    reads = "all" if k is None else f"k{k}"
    name = f"M{images}-N{patches}-Q{states}-H{heads}-E{width}-{reads}" + (f"-one-{shared}" if shared else "")
    sizes = {"images": images, "patches": patches, "states": states, "heads": heads, "width": width, "k": k}
    return Case(name, {**sizes, "shared": shared, "grid": grid}, **more)


TESTS = (
    _case(1, 2, 2, 1, 2, 2),
    _case(2, 7, 5, 2, 16, 3),  # rows of whole 16-byte units: 16-byte loads
    _case(2, 5, 3, 1, 37, 4),  # a prime width
    _case(1, 5, 3, 2, 20, 5, shared="state and image"),  # one learned query for all states
    _case(2, 3, 4, 1, 8, 2, shared="mixed"),
    _case(1, 9, 2, 1, 64, 1),
    _case(1, 3, 2, 1, 72, 6),  # wider than 8 lanes hold; more neighbors than one round takes
    _case(1, 2, 2, 1, 136, 2),  # wider than 16 lanes hold
    _case(2, 11, 1, 2, 16, None),
    _case(2, 1, 1, 1, 24, None, shared="image"),
    _case(1, 37, 2, 1, 40, None, shared="state"),
    _case(1, 6, 1, 1, 13, None),
    _case(1, 3, 40, 1, 8, 2),  # more states than a block takes at once
    _case(0, 3, 2, 1, 8, 2),  # no images
    _case(2, 3, 0, 1, 8, 2),  # no states
    _case(2, 3, 2, 1, 8, 0),  # no state reads a patch: the own value
    _case(1, 0, 2, 1, 8, 2),  # no patches
    _case(1, 0, 1, 1, 8, None),
    _case(1, 3, 2, 1, 0, 2),  # no width
)

BENCHES = (
    _case(16, 196, 196, 6, 64, 4, grid=(14, 14), small=True),
    _case(64, 36, 36, 6, 64, 4, grid=(6, 6), small=True),
    _case(16, 196, 1, 6, 64, None, small=True),
    _case(16, 196, 196, 6, 64, 4, grid=(14, 14), shared="state and image", small=True),
    _case(128, 196, 196, 6, 64, 4, grid=(14, 14)),
    _case(512, 36, 36, 6, 64, 4, grid=(6, 6)),
    _case(128, 196, 196, 12, 64, 4, grid=(14, 14)),
    _case(128, 196, 1, 6, 64, None),
)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    s = case.sizes
    draws = generator(seed, s["patches"], s["width"])
    outer = {name: [s["images"], s["states"]] for name in STATE}
    if s["shared"] == "mixed":
        outer["q"][0], outer["k_self"][1] = 1, 1
    else:
        for sizes in outer.values():
            sizes[0] = 1 if "image" in s["shared"] else sizes[0]
            sizes[1] = 1 if "state" in s["shared"] else sizes[1]
    if s["k"] is None and s["shared"] == "state":  # one tensor must have all states
        outer["q"][1] = s["states"]
    outer |= {name: [s["images"], s["patches"]] for name in PATCHES}
    draw = lambda sizes: torch.randn(*sizes, s["heads"], s["width"], generator=draws)
    tensors = {name: draw(sizes).to(device, dtype) for name, sizes in outer.items()}
    index = None if s["k"] is None else _neighbors(s, draws).to(device)
    return {**tensors, "index": index}


def _neighbors(s: Mapping[str, Any], draws: torch.Generator) -> Tensor:
    """Any patches, some twice and some missing; with a grid, different ones of the 3x3 window, as SelfPatch has them."""
    if s["grid"] is None:
        shape = (s["images"], s["states"], s["k"])
        return torch.randint(-1, max(s["patches"], 1), shape, generator=draws, dtype=torch.int32)
    height, width = s["grid"]
    steps = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x])
    chosen = torch.rand(s["images"], s["states"], 8, generator=draws).argsort(dim=-1)[..., : s["k"]]
    patch = torch.arange(s["states"])[:, None]
    y = (patch // width + steps[chosen, 0]) % height
    x = (patch % width + steps[chosen, 1]) % width
    return (y * width + x).int()


def _min_bytes(case: Case, dtype: torch.dtype) -> int:
    """Keys, values and states read once, the output written once; the indices read once."""
    s = case.sizes
    states = s["images"] * s["states"]
    own = 3 * (1 if s["shared"] else states)
    rows = 2 * s["images"] * s["patches"] + own + states
    return rows * s["heads"] * s["width"] * dtype.itemsize + states * 4 * (s["k"] or 0)


def _flops(case: Case) -> int:
    """A product with each key, and one with each value."""
    s = case.sizes
    keys = 1 + (s["patches"] if s["k"] is None else s["k"])
    return 4 * s["images"] * s["states"] * s["heads"] * s["width"] * keys


def _saved_sums(arguments: dict[str, Any]) -> Tensor:
    return torch.ops.patchlight.class_attention_fwd(*OP.bind(**arguments))[1][..., None]


SPEC = OpSpec(
    op=OP,
    public=class_attention,
    tests=TESTS,
    benches=BENCHES,
    inputs=_inputs,
    min_bytes=_min_bytes,
    flops=_flops,
    differentiable=(*STATE, *PATCHES),
    saved_sums=_saved_sums,
    sample=first_images(16, *STATE, *PATCHES, "index"),
)
