"""Triton kernel of block_masks: a program for each crop, one launch for all."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import BLOCK, BLOCKS, COUNT, MIN_ASPECT, PATCH, TIE, purpose_bits

_COUNT, _PATCH, _BLOCK = tl.constexpr(COUNT), tl.constexpr(PATCH), tl.constexpr(BLOCK)
_BLOCKS, _TIE, _WIDEST = tl.constexpr(BLOCKS), tl.constexpr(TIE), tl.constexpr(-math.log(MIN_ASPECT))
_GOLDEN = tl.constexpr(-0x61C8864680B583EB)
_ROUND = tl.constexpr(2.0**23)  # added and taken away again, it rounds to an even integer


@triton.jit
def _mix(x):
    """The finalizer of SplitMix64."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


@triton.jit
def _next(bits, key):
    """Random bits for one more key."""
    return _mix((bits + _GOLDEN) ^ _mix(key + _GOLDEN))


@triton.jit
def _bits_of_crop(purpose, first, crop, batch):
    """Random bits of a crop, from which all its numbers are drawn."""
    bits = _next(_next(purpose, first + crop % batch), (crop // batch).to(tl.int64))
    return _next(tl.zeros_like(bits), bits)


@triton.jit
def _upper(bits):
    """The upper 24 of 64 bits."""
    return bits >> 40 & 0xFFFFFF


@triton.jit
def _uniform(bits):
    """fp32 in [0, 1)."""
    return _upper(bits).to(tl.float32) / 16777216.0


@triton.jit
def _product(a, b):
    """a b, rounded to fp32: by way of fp64, where it is exact, so that no sum can be fused with it."""
    return (a.to(tl.float64) * b.to(tl.float64)).to(tl.float32)


@triton.jit
def _nth_smallest(keys, n, BITS: tl.constexpr):
    """The n-th smallest of different keys below 2^BITS, bit by bit from above; 0 for n = 0."""
    found = tl.zeros((), tl.int64)
    for i in range(BITS):
        trial = found | (tl.full((), 1, tl.int64) << (BITS - 1 - i))
        below = tl.sum((keys < trial).to(tl.int32), 0)
        found = tl.where(below < n, trial, found)
    return found


@triton.jit
def _place_side(length, CELLS: tl.constexpr, draw):
    """A block's length along one axis, at least 1 and below the grid's, and where it begins."""
    MOST: tl.constexpr = max(1, CELLS - 1)
    length = tl.minimum(tl.maximum((length + _ROUND) - _ROUND, 1.0), MOST * 1.0)
    return length, tl.floor(_product(draw, CELLS - length + 1))


@triton.jit
def _draws(crop, place):
    """Uniform numbers of the blocks."""
    return _uniform(_next(_next(crop, tl.full((), _BLOCK, tl.int64)), place.to(tl.int64)))


@triton.jit
def _block_order(crop, count, patch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The order in which patches are masked: block after block, each from its center outwards."""
    SMALLEST: tl.constexpr = (min(HEIGHT, WIDTH) // 3) * (min(HEIGHT, WIDTH) // 3) * 1.0
    FAR: tl.constexpr = (HEIGHT * HEIGHT + WIDTH * WIDTH) * 1.0
    block = tl.arange(0, _BLOCKS)
    area = SMALLEST + _product(_draws(crop, block), count.to(tl.float32) - SMALLEST)
    exponent = _product(2 * _draws(crop, block + _BLOCKS) - 1, tl.full((), _WIDEST, tl.float32))
    aspect = tl.exp(exponent.to(tl.float64)).to(tl.float32).to(tl.float64)
    height = tl.sqrt((area.to(tl.float64) * aspect).to(tl.float32).to(tl.float64)).to(tl.float32)
    width = tl.sqrt((area.to(tl.float64) / aspect).to(tl.float32).to(tl.float64)).to(tl.float32)
    height, top = _place_side(height, HEIGHT, _draws(crop, block + 2 * _BLOCKS))
    width, left = _place_side(width, WIDTH, _draws(crop, block + 3 * _BLOCKS))
    row = (patch // WIDTH).to(tl.float32)[None, :] - top[:, None]
    column = (patch % WIDTH).to(tl.float32)[None, :] - left[:, None]
    inside = (row >= 0) & (row < height[:, None]) & (column >= 0) & (column < width[:, None])
    row -= ((height - 1) / 2)[:, None]
    column -= ((width - 1) / 2)[:, None]
    distance = row * row + column * column  # exact
    covered = tl.where(inside, distance + block.to(tl.float32)[:, None] * FAR, 2.0 * _BLOCKS * FAR)
    uncovered = _BLOCKS * FAR + tl.sum(tl.where(block[:, None] == 0, distance, 0.0), 0)
    return tl.minimum(tl.min(covered, 0), uncovered)


@triton.jit
def _masks_kernel(
    first_ptr,  # a single int64
    counts_ptr,  # [crops] int32
    out_ptr,  # [crops, HEIGHT * WIDTH] bool
    purpose,  # random bits of seed and purpose
    crops,
    batch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    CROPS: tl.constexpr,  # a power of two, as the next ones
    CROP_BITS: tl.constexpr,
    PATCHES: tl.constexpr,
    PATCH_BITS: tl.constexpr,
):
    """The mask of one crop. Its count depends on the numbers of all crops, which each program draws."""
    own = tl.program_id(0)
    seed, first = tl.full((), 0, tl.int64) + purpose, tl.load(first_ptr)
    every = tl.arange(0, CROPS)
    bits = _bits_of_crop(seed, first, every, batch)
    keys = _upper(_next(bits, tl.full((), _COUNT, tl.int64))) << CROP_BITS | every.to(tl.int64)
    keys = tl.where(every < crops, keys, 0x7FFFFFFFFFFFFFFF)
    place = _nth_smallest(keys, own + 1, 24 + CROP_BITS) & (CROPS - 1)
    count = tl.load(counts_ptr + place)

    crop = _bits_of_crop(seed, first, own, batch)
    patch = tl.arange(0, PATCHES)
    bits = _next(_next(crop, tl.full((), _PATCH, tl.int64)), patch.to(tl.int64))
    if IN_BLOCKS:
        order = _block_order(crop, count, patch, HEIGHT, WIDTH)
        order += _product(_uniform(bits), tl.full((), _TIE, tl.float32))  # the random part only breaks ties
        keys = order.to(tl.int32, bitcast=True).to(tl.int64)  # as no order is negative
    else:
        keys = _upper(bits)
    keys = keys << PATCH_BITS | patch.to(tl.int64)
    exists = patch < HEIGHT * WIDTH
    keys = tl.where(exists, keys, 0x7FFFFFFFFFFFFFFF)
    last = _nth_smallest(keys, count, (31 if IN_BLOCKS else 24) + PATCH_BITS)
    masked = (keys <= last) & (count > 0)
    tl.store(out_ptr + own.to(tl.int64) * (HEIGHT * WIDTH) + patch, masked, mask=exists)


def _bits_of(size: int) -> int:
    """The bits of the numbers below `size`."""
    return max(1, (size - 1).bit_length())


def block_masks_fwd(
    first: Tensor, counts: Tensor, seed: int, views: int, height: int, width: int, blocks: bool
) -> Tensor:
    """Raw arguments as `patchlight::block_masks_fwd`."""
    crops, patches = len(counts), height * width
    out = torch.empty(views, crops // views, patches, dtype=torch.bool, device=counts.device)
    crop_bits, patch_bits = _bits_of(crops), _bits_of(patches)
    _masks_kernel[(crops,)](
        first,
        counts,
        out,
        purpose_bits(seed),
        crops,
        crops // views,
        HEIGHT=height,
        WIDTH=width,
        IN_BLOCKS=blocks,
        CROPS=1 << crop_bits,
        CROP_BITS=crop_bits,
        PATCHES=1 << patch_bits,
        PATCH_BITS=patch_bits,
    )
    return out
