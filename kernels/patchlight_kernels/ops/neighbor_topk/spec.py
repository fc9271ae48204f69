"""Cases, inputs and costs of neighbor_topk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...registry import Case, OpSpec, first_images, generator
from . import reference
from .op import ALL, OP, neighbor_topk


def _case(
    images: int, grid: tuple[int, int], channels: int, k: int, radius: int | None, border: str = "wrap", **more: Any
) -> Case:
    window = "all" if radius is None else f"{2 * radius + 1}x{2 * radius + 1}"
    name = f"B{images}-{grid[0]}x{grid[1]}-D{channels}-{window}-k{k}-{border}"
    sizes = {"images": images, "grid": grid, "channels": channels, "k": k, "radius": radius, "border": border}
    return Case(name, sizes, **more)


TESTS = (
    _case(1, (3, 3), 1, 8, 1),  # the smallest torus that holds the window; one channel
    _case(2, (5, 6), 37, 4, 1),  # primes, rows that are not 16-byte aligned
    _case(1, (7, 7), 72, 4, 1, "clip"),
    _case(2, (4, 17), 40, 3, 1, "clip"),  # two tiles of 16 in a row of the grid, the second nearly empty
    _case(1, (9, 18), 64, 1, 1),
    _case(1, (6, 5), 24, 24, 2),  # as many as the window holds
    _case(1, (5, 8), 136, 4, 2, "clip"),
    _case(1, (2, 3), 16, 3, 1),  # a torus smaller than the window: a neighbor counts once
    _case(1, (1, 9), 8, 2, 1, "clip"),
    _case(1, (8, 9), 48, 6, 3),
    _case(2, (4, 5), 20, 19, None),
    _case(1, (9, 11), 40, 4, None),
    _case(1, (3, 3), 16, 2, None),  # all patches, as many as a window has
    _case(0, (3, 3), 8, 2, 1),  # no images
    _case(2, (3, 3), 0, 2, 1),  # no channels: every cosine is 0, the lowest indices are chosen
)

BENCHES = (
    _case(16, (14, 14), 384, 4, 1, small=True),
    _case(16, (14, 14), 384, 4, 2, small=True),
    _case(16, (14, 14), 384, 4, None, small=True),
    _case(64, (6, 6), 384, 4, 1, small=True),
    _case(128, (14, 14), 384, 4, 1),
    _case(512, (14, 14), 384, 4, 1),
    _case(128, (28, 28), 384, 4, 1),
    _case(512, (6, 6), 384, 4, 1),
    _case(512, (14, 14), 384, 4, 2),
    _case(512, (14, 14), 384, 4, None),
)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    s = case.sizes
    patches = s["grid"][0] * s["grid"][1]
    x = torch.randn(s["images"], patches, s["channels"], generator=generator(seed, patches, s["channels"]))
    return {
        "x": x.to(device, dtype),
        "grid": s["grid"],
        "k": s["k"],
        "radius": s["radius"],
        "border": s["border"],
        "return_scores": True,
    }


def _observe(arguments: dict[str, Any], output: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The scores, and the float64 cosines of the chosen patches, which do not depend on how a tie is broken."""
    index, score = output
    unit = torch.nn.functional.normalize(arguments["x"].double(), dim=-1, eps=reference.EPS)
    gram = unit @ unit.transpose(1, 2)
    cosine = gram.gather(2, index.long().clamp(min=0)).masked_fill(index < 0, -2.0)
    return {"score": score.double().clamp(min=-2.0), "cosine": cosine}


def _min_bytes(case: Case, dtype: torch.dtype) -> int:
    """x read once, the indices written once."""
    s = case.sizes
    patches = s["images"] * s["grid"][0] * s["grid"][1]
    return patches * (s["channels"] * dtype.itemsize + s["k"] * 4)


def _flops(case: Case) -> int:
    """Each pair once, and each norm."""
    s = case.sizes
    height, width = s["grid"]
    candidates = reference.capacity(height, width, ALL if s["radius"] is None else s["radius"])
    return s["images"] * height * width * s["channels"] * (candidates + 2)


SPEC = OpSpec(
    op=OP,
    public=neighbor_topk,
    tests=TESTS,
    benches=BENCHES,
    inputs=_inputs,
    min_bytes=_min_bytes,
    flops=_flops,
    observe=_observe,
    sample=first_images(16, "x"),
)
