"""neighbor_topk: for every patch, the k most similar patches of its neighborhood (SelfPatch, Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import hardware
from ...arguments import (
    accumulator,
    check_dtype,
    check_flag,
    check_grid,
    check_integer,
    check_required,
    message,
    with_dense_rows,
)
from ...dispatch import Impl, Op, first_reason, triton_call
from ...extension import native_call
from . import reference

OP_NAME = "neighbor_topk"
ALL = -1  # the radius of the checked arguments that means every patch


def _bind(
    x: Tensor,
    grid: tuple[int, int],
    k: int,
    radius: int | None = 1,
    border: str = "wrap",
    return_scores: bool = False,
) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    check_required(OP_NAME, x=x)
    if x.dim() != 3:
        raise ValueError(
            message(OP_NAME, "x must be [images, patches, width]", f"shape {tuple(x.shape)}", "reshape it")
        )
    check_dtype(OP_NAME, "x", x.dtype)
    height, width = check_grid(OP_NAME, grid)
    if height * width != x.shape[1]:
        rule = f"grid must be (rows, columns) of the {x.shape[1]} patches of x"
        raise ValueError(message(OP_NAME, rule, f"{height}x{width}", "pass the grid that x was made of"))
    if border not in ("wrap", "clip"):
        raise ValueError(message(OP_NAME, "border must be 'wrap' or 'clip'", repr(border), "choose one"))
    if radius is not None:
        check_integer(OP_NAME, "radius", radius, "1 is the 3x3 window, None takes all patches")
        if radius < 1:
            rule = "radius must be at least 1, or None for all patches"
            raise ValueError(message(OP_NAME, rule, radius, "1 is the 3x3 window"))
        radius = min(radius, max(height, width))  # a larger window has the same patches
    check_integer(OP_NAME, "k", k, "count the neighbors to select")
    check_flag(OP_NAME, "return_scores", return_scores)
    most = reference.capacity(height, width, ALL if radius is None else radius)
    if not 1 <= k <= most:
        rule = f"k must be at least 1 and at most the {most} neighbors of radius={radius} on a {height}x{width} grid"
        raise ValueError(message(OP_NAME, rule, k, "use another k or radius"))
    x = with_dense_rows(x.detach())  # the selection has no gradient
    return x, height, width, k, ALL if radius is None else radius, border == "wrap", return_scores


def _too_many_neighbors(k: int) -> str | None:
    return f"k={k} exceeds the 32 that its registers hold" if k > 32 else None


def _cuda_shared_bytes(x: Tensor, height: int, width: int, radius: int, wrap: bool) -> int:
    """What the smallest block of the CUDA kernels needs: 32 patches against 64, or a row of the grid with its windows."""
    gram = 32 * (-(-x.shape[2] * x.dtype.itemsize // 128) * 128 + 65 * 4) + 3 * 64 * 128 + 64 * 4
    side = 2 * radius + 1
    if radius not in (1, 2) or (wrap and min(height, width) < side):
        return gram
    rows = min(height, side)
    window = rows * width * (3 * 128 + (side * side // 2 + 1) * 4)
    fits = rows * -(-width // 16) <= (32 if radius == 1 else 16) and window <= 112 * 1024
    return min(gram, window) if fits else gram


def _cuda_unsupported(x: Tensor, height: int, width: int, k: int, radius: int, wrap: bool, scores: bool) -> str | None:
    reason = first_reason(
        hardware.unsupported_by_all(x.dtype, x),
        _too_many_neighbors(k),
        hardware.no_cuda_library(x, "neighbor_topk_fwd"),
    )
    return reason or hardware.too_little_shared_memory(x, _cuda_shared_bytes(x, height, width, radius, wrap))


def _cpp_unsupported(x: Tensor, *_) -> str | None:
    return first_reason(hardware.unsupported_by_all(x.dtype, x), hardware.no_cpu_library(x, "neighbor_topk_fwd"))


def _triton_unsupported(x: Tensor, height: int, width: int, k: int, *_) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(x.dtype, x), _too_many_neighbors(k), hardware.no_triton(x)
    ) or first_reason(
        hardware.offsets_too_large(x.shape[1] * x.shape[2]), hardware.grid_too_large(len(x) * -(-x.shape[1] // 16))
    )


def _size(x: Tensor, height: int, width: int, k: int, radius: int, *_) -> str:
    return "all patches" if radius == ALL else f"{2 * radius + 1}x{2 * radius + 1}"


OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        Impl("cuda", native_call("neighbor_topk_fwd"), _cuda_unsupported),
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", native_call("neighbor_topk_fwd"), _cpp_unsupported),
        Impl("triton", triton_call(__package__, "neighbor_topk_fwd"), _triton_unsupported),
        Impl("reference", reference.neighbor_topk_fwd, lambda *args: None),
    ),
    size=_size,
)


def _fake(x: Tensor, height: int, width: int, k: int, radius: int, wrap: bool, scores: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], k)
    score = x.new_empty(shape if scores else 0, dtype=accumulator(x.dtype))
    return x.new_empty(shape, dtype=torch.int32), score


_fwd = OP.define(
    "fwd",
    "(Tensor x, int height, int width, int k, int radius, bool wrap, bool scores) -> (Tensor, Tensor)",
    run=OP.forward,
    fake=_fake,
)


def neighbor_topk(
    x: Tensor,
    grid: tuple[int, int],
    k: int,
    radius: int | None = 1,
    border: str = "wrap",
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """For every patch, finds the k patches of its neighborhood that point most nearly the same way.

    SelfPatch, Eq. 3: s(i, j) = x_i . x_j / (|x_i| |x_j|) over the window around i without i itself; the k largest are chosen.

    Args:
        x: [B, N, D] patch features, fp32, bf16 or fp16 (fp64 runs the reference); rows may be strided.
        grid: (rows, columns) of the patches, row-major, rows * columns = N.
        k: neighbors to select, up to what the window can hold.
        radius: 1 is the 3x3 window of the paper, 2 is 5x5, any size; None takes all other patches.
        border: "wrap" joins opposite borders (as the released code does), "clip" ends at the border; there a corner
            patch has fewer neighbors (3 for radius 1) and the missing ones come last as -1.
        return_scores: also return the similarities.

    Returns:
        index [B, N, k] int32, most similar first; with `return_scores` also score [B, N, k] fp32 (-inf where index is -1).

    Ties go to the lower index. A NaN similarity ranks below every number. No gradient. Dot products accumulate in fp32.
    Traffic: x is read once; B*N*k*4 bytes are written (twice that with scores).
    """
    index, score = _fwd(*_bind(x, grid, k, radius, border, return_scores))
    return (index, score) if return_scores else index
