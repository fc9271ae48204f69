"""neighbor_topk: for every patch, the k most similar patches of its neighborhood (SelfPatch, Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension, hardware
from ...dispatch import Impl, Op, first_reason
from . import reference

ALL = -1  # the raw radius that means every patch
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _bind(
    x: Tensor,
    grid: tuple[int, int],
    k: int,
    radius: int | None = 1,
    border: str = "wrap",
    return_scores: bool = False,
) -> tuple:
    """Checks the public arguments and returns the raw ones."""
    if x.dim() != 3:
        raise ValueError(f"neighbor_topk: x must be [images, patches, width], got shape {tuple(x.shape)}; reshape it")
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"neighbor_topk: x must be float32, bfloat16, float16 or float64, got {x.dtype}; cast it")
    height, width = grid
    if height < 1 or width < 1 or height * width != x.shape[1]:
        raise ValueError(
            f"neighbor_topk: grid {height}x{width} does not hold the {x.shape[1]} patches of x; pass (rows, columns) of x"
        )
    if border not in ("wrap", "clip"):
        raise ValueError(f"neighbor_topk: border must be 'wrap' or 'clip', got {border!r}; choose one")
    if radius is not None and radius < 1:
        raise ValueError(f"neighbor_topk: radius must be at least 1, or None for all patches, got {radius}")
    room = reference.capacity(height, width, ALL if radius is None else radius)
    if k < 1:
        raise ValueError(f"neighbor_topk: k must be at least 1, got {k}; ask for one neighbor or more")
    if k > room:
        raise ValueError(
            f"neighbor_topk: k={k} exceeds the {room} neighbors of radius={radius} on a {height}x{width} grid; "
            f"use a larger radius or k<={room}"
        )
    x = x.detach()  # the selection has no gradient
    if x.shape[2] > 1 and x.stride(2) != 1:
        x = x.contiguous()
    return x, height, width, k, ALL if radius is None else radius, border == "wrap", return_scores


def _unfit(x: Tensor) -> str | None:
    """What no fast implementation takes."""
    return first_reason(
        "float64 features run the reference only" if x.dtype not in DTYPES else None,
        "there is nothing to compute" if x.numel() == 0 else None,
    )


def _cuda_unsupported(x: Tensor, height: int, width: int, k: int, radius: int, wrap: bool, scores: bool) -> str | None:
    return first_reason(
        _unfit(x),
        f"k={k} exceeds the 32 that its registers hold" if k > 32 else None,
        hardware.no_cuda_library(x, "neighbor_topk_fwd"),
    )


def _cpp_unsupported(x: Tensor, height: int, width: int, k: int, radius: int, wrap: bool, scores: bool) -> str | None:
    return first_reason(_unfit(x), hardware.no_cpu_library(x, "neighbor_topk_fwd"))


def _triton_unsupported(
    x: Tensor, height: int, width: int, k: int, radius: int, wrap: bool, scores: bool
) -> str | None:
    return first_reason(
        _unfit(x),
        f"k={k} exceeds the 32 that its registers hold" if k > 32 else None,
        hardware.no_triton(x),
    )


def _native_fwd(*raw) -> tuple[Tensor, Tensor]:
    return extension.native("neighbor_topk_fwd")(*raw)


def _triton_fwd(*raw) -> tuple[Tensor, Tensor]:
    from .triton_kernels import neighbor_topk_fwd  # here, so that a machine without Triton can import the package

    return neighbor_topk_fwd(*raw)


OP = Op(
    "neighbor_topk",
    bind=_bind,
    impls=(
        Impl("cuda", _native_fwd, _cuda_unsupported),
        Impl("cpp", _native_fwd, _cpp_unsupported),  # before Triton, which has CPU tensors only in its interpreter
        Impl("triton", _triton_fwd, _triton_unsupported),
        Impl("reference", reference.neighbor_topk_fwd, lambda *raw: None),
    ),
)


def _run(*raw) -> tuple[Tensor, Tensor]:
    return OP.choose(*raw).fwd(*raw)


def _fake(x: Tensor, height: int, width: int, k: int, radius: int, wrap: bool, scores: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], k)
    score = x.new_empty(shape if scores else 0, dtype=reference.score_dtype(x.dtype))
    return x.new_empty(shape, dtype=torch.int32), score


_fwd = OP.define(
    "fwd",
    "(Tensor x, int height, int width, int k, int radius, bool wrap, bool scores) -> (Tensor, Tensor)",
    run=_run,
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

    SelfPatch, Eq. 3: s(i, j) = x_i . x_j / (|x_i| |x_j|) over the window around i without i itself; the k largest win.

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
