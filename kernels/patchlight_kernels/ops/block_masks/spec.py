"""Cases, inputs and costs of block_masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...registry import Case, OpSpec, generator
from . import reference
from .op import OP, block_masks


def _case(views: int, batch: int, grid: tuple[int, int], shape: str = "block", **more: Any) -> Case:
    sizes = {"views": views, "batch": batch, "grid": grid, "shape": shape}
    return Case(f"V{views}-B{batch}-{grid[0]}x{grid[1]}-{shape}", sizes, **more)


TESTS = (
    _case(1, 1, (1, 1)),
    _case(2, 2, (14, 14)),
    _case(3, 11, (3, 4)),  # more crops than lanes of a warp
    _case(1, 2, (7, 12)),
    _case(2, 3, (6, 6), "random"),
    _case(1, 3, (1, 9)),
    _case(2, 2, (2, 2)),
    _case(1, 2, (17, 20), "random"),  # more patches than threads
    _case(2, 0, (3, 3)),  # no images
)

BENCHES = (
    _case(2, 64, (14, 14), small=True),
    _case(2, 64, (14, 14), "random", small=True),
    _case(2, 256, (14, 14)),
    _case(2, 64, (28, 28)),
)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Any counts from none to all patches, ascending; dtype does not matter."""
    s = case.sizes
    patches = s["grid"][0] * s["grid"][1]
    counts = torch.randint(0, patches + 1, (s["views"] * s["batch"],), generator=generator(seed, patches, s["batch"]))
    return {
        "first": torch.tensor(1000 * seed + 3, device=device),
        "counts": counts.sort().values.int().to(device),
        "grid": s["grid"],
        "views": s["views"],
        "seed": seed,
        "shape": s["shape"],
    }


def _observe(arguments: dict[str, Any], output: Tensor) -> dict[str, Tensor]:
    return {"masked": output.double()}


def _min_bytes(case: Case, dtype: torch.dtype) -> int:
    """A byte for each patch is written."""
    s = case.sizes
    return s["views"] * s["batch"] * s["grid"][0] * s["grid"][1]


def _flops(case: Case) -> int:
    """For each patch 30 operations of its hash, and 10 for each block."""
    return _min_bytes(case, torch.float32) * (30 + 10 * (reference.BLOCKS if case.sizes["shape"] == "block" else 0))


SPEC = OpSpec(
    op=OP,
    public=block_masks,
    tests=TESTS,
    benches=BENCHES,
    inputs=_inputs,
    min_bytes=_min_bytes,
    flops=_flops,
    observe=_observe,
)
