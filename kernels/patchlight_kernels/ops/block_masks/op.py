"""block_masks: which patches of each crop are masked, a pure function of a seed and the images' running numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import hardware
from ...arguments import check_grid, check_integer, check_required, message
from ...dispatch import Impl, Op, first_reason, triton_call
from ...extension import native_call
from . import reference

OP_NAME = "block_masks"
SHAPES = ("block", "random")
MAX_CROPS = 8192  # whose random numbers a GPU's block keeps to find its own count
MAX_PATCHES = 4096  # of a crop, in the same place


def _bind(
    first: Tensor, counts: Tensor, grid: tuple[int, int], views: int = 1, seed: int = 0, shape: str = "block"
) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    check_required(OP_NAME, first=first, counts=counts)
    if first.dim() != 0 or first.dtype != torch.int64:
        rule, got = "first must be a single int64", f"{first.dtype} {tuple(first.shape)}"
        raise ValueError(message(OP_NAME, rule, got, "it is the running number of the first image"))
    if counts.dim() != 1 or counts.dtype != torch.int32:
        rule, got = "counts must be int32 [views * batch]", f"{counts.dtype} {tuple(counts.shape)}"
        raise ValueError(message(OP_NAME, rule, got, "give the number of masked patches of each crop"))
    if first.device != counts.device:
        raise ValueError(message(OP_NAME, f"first must be on {counts.device} like counts", first.device, "move it"))
    check_integer(OP_NAME, "views", views, "count the crops of an image")
    check_integer(OP_NAME, "seed", seed, "any integer of 64 bits serves", bits=64)
    if views < 1 or len(counts) % views:
        rule = f"views must divide the {len(counts)} crops of counts"
        raise ValueError(message(OP_NAME, rule, views, "give a count for each crop"))
    height, width = check_grid(OP_NAME, grid)
    if shape not in SHAPES:
        raise ValueError(message(OP_NAME, f"shape must be one of {', '.join(SHAPES)}", repr(shape), "choose one"))
    return first, counts.contiguous(), seed, views, height, width, shape == "block"


def _too_large(counts: Tensor, height: int, width: int) -> str | None:
    if len(counts) > MAX_CROPS:
        return f"{len(counts)} crops exceed the {MAX_CROPS} whose numbers it keeps"
    if height * width > MAX_PATCHES:
        return f"{height * width} patches exceed the {MAX_PATCHES} that it keeps"
    return None


def _cuda_unsupported(first: Tensor, counts: Tensor, seed: int, views: int, height: int, width: int, *_) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(counts.dtype, counts),
        _too_large(counts, height, width),
        hardware.no_cuda_library(counts, "block_masks_fwd"),
    )


def _cpp_unsupported(first: Tensor, counts: Tensor, *_) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(counts.dtype, counts), hardware.no_cpu_library(counts, "block_masks_fwd")
    )


def _triton_unsupported(
    first: Tensor, counts: Tensor, seed: int, views: int, height: int, width: int, *_
) -> str | None:
    return first_reason(
        hardware.unsupported_by_all(counts.dtype, counts),
        _too_large(counts, height, width),
        hardware.no_triton(counts),
    )


OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        Impl("cuda", native_call("block_masks_fwd"), _cuda_unsupported),
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", native_call("block_masks_fwd"), _cpp_unsupported),
        Impl("triton", triton_call(__package__, "block_masks_fwd"), _triton_unsupported),
        Impl("reference", reference.block_masks_fwd, lambda *args: None),
    ),
)


def _fake(first: Tensor, counts: Tensor, seed: int, views: int, height: int, width: int, blocks: bool) -> Tensor:
    return counts.new_empty(views, counts.shape[0] // views, height * width, dtype=torch.bool)


_fwd = OP.define(
    "fwd",
    "(Tensor first, Tensor counts, int seed, int views, int height, int width, bool blocks) -> Tensor",
    run=OP.forward,
    fake=_fake,
)


def block_masks(
    first: Tensor, counts: Tensor, grid: tuple[int, int], views: int = 1, seed: int = 0, shape: str = "block"
) -> Tensor:
    """Chooses the masked patches of V crops of each of B images, without waiting for the device.

    Args:
        first: a single int64, the running number of the first image; image b has the number first + b.
        counts: [V * B] int32, how many patches are masked in a crop, from 0 to N. A random order, drawn from the
            numbers of all crops, decides which crop gets which count.
        grid: (rows, columns) of the patches, N = rows * columns.
        views: V, crops per image.
        seed: any int64.
        shape: "block": eight blocks are drawn per crop, each as large as the crop's whole count allows and between 0.3 and
            1 / 0.3 times as high as wide; they are taken in order, and the one that would exceed the count from its center
            outwards. "random": single patches.

    Returns:
        [V, B, N] bool, True for masked patches, exactly counts of them in each crop.

    Every implementation on every device returns the same bits. Traffic: V * B * N bytes written.
    """
    return _fwd(*_bind(first, counts, grid, views, seed, shape))
