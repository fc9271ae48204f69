"""Cases, inputs and costs of self_relation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...registry import Case, OpSpec, generator, observe_loss
from .op import OP, self_relation


def _case(
    views: int, images: int, heads: int, rows: int, width: int, teacher_width: int | None = None, **more: Any
) -> Case:
    """A channel relation if the teacher's width is given: its features lie positions by channels."""
    sizes = {"views": views, "images": images, "heads": heads, "rows": rows, "width": width}
    name = f"S{views}-B{images}-H{heads}-N{rows}-E{width}"
    if teacher_width is None:
        return Case(name, sizes | {"teacher_width": width, "transposed": False}, **more)
    return Case(f"{name}-F{teacher_width}", sizes | {"teacher_width": teacher_width, "transposed": True}, **more)


TESTS = (
    _case(1, 1, 1, 3, 2),
    _case(2, 3, 2, 11, 7),  # rows that are not 16-byte aligned
    _case(3, 1, 1, 37, 5, 19),
    _case(1, 2, 1, 67, 41),  # a second block of three rows
    _case(1, 1, 1, 130, 72, 9),  # three blocks, a second chunk of channels
    _case(2, 1, 1, 64, 64),  # one full block of everything
    _case(1, 1, 1, 1, 1),  # one of everything: the loss is 0
    _case(1, 1, 1, 20, 270, 30),  # more channels than a block of a GPU kernel makes
    _case(0, 2, 1, 3, 4),  # no views, no images, no heads, no rows, no channels
    _case(2, 0, 1, 3, 4),
    _case(1, 2, 0, 3, 4),
    _case(1, 2, 1, 0, 4),
    _case(1, 2, 1, 3, 0),  # every relation is 0
)

# SERE on ViT-S and ViT-B: overlaps of two global views at 13 x 13 points and of globals with locals at 6 x 6, every pair of
# views with samples of its own; channels of 14 x 14 and of 6 x 6 positions against those of 14 x 14.
BENCHES = (
    _case(1, 8, 6, 169, 64, small=True),
    _case(1, 64, 6, 36, 64, small=True),
    _case(1, 8, 1, 384, 196, 196, small=True),
    _case(4, 8, 1, 384, 36, 196, small=True),
    _case(1, 128, 6, 169, 64),
    _case(1, 1024, 6, 36, 64),
    _case(1, 128, 1, 384, 196, 196),
    _case(8, 128, 1, 384, 36, 196),
    _case(1, 128, 1, 768, 196, 196),
)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Not negative, as behind a ReLU; students have the teacher's images, so their relations are similar."""
    s = case.sizes
    views, images, heads, rows = s["views"], s["images"], s["heads"], s["rows"]
    draws = generator(seed, rows, s["width"])
    random = lambda *shape: torch.randn(*shape, generator=draws)
    shared = random(images, heads, rows, max(s["width"], s["teacher_width"]))

    def features(width: int, *more: int) -> Tensor:
        x = (shared[..., :width] + 0.5 * random(*more, images, heads, rows, width)).relu().to(device, dtype)
        return x.mT.contiguous().mT if s["transposed"] else x

    return {
        "student": features(s["width"], views),
        "teacher": features(s["teacher_width"]),
        "student_scale": max(1, s["width"]) ** -0.5,
        "teacher_scale": max(1, s["teacher_width"]) ** -0.5 / 0.5,
        "weight": (random(views, images).abs() / max(1, views * images)).to(device),
    }


def _min_bytes(case: Case, dtype: torch.dtype) -> int:
    """Every feature read once."""
    s = case.sizes
    return s["images"] * s["heads"] * s["rows"] * (s["views"] * s["width"] + s["teacher_width"]) * dtype.itemsize


def _flops(case: Case) -> int:
    """Half of every relation, as it is symmetric."""
    s = case.sizes
    return s["images"] * s["heads"] * s["rows"] ** 2 * (s["views"] * s["width"] + s["teacher_width"])


def _backward_flops(case: Case) -> int:
    """One product with the student's features."""
    s = case.sizes
    return 2 * s["images"] * s["heads"] * s["rows"] ** 2 * s["views"] * s["width"]


SPEC = OpSpec(
    op=OP,
    public=self_relation,
    tests=TESTS,
    benches=BENCHES,
    inputs=_inputs,
    min_bytes=_min_bytes,
    flops=_flops,
    backward_flops=_backward_flops,
    observe=observe_loss,
    differentiable=("student",),
)
