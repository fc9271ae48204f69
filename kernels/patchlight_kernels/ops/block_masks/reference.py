"""The specification of block_masks in plain PyTorch. Every device computes the same bits.

Hashes and places are integers. What is real is rounded to fp32 after each step, and the exponential is rounded from fp64, so
no implementation may differ in its last bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_ASPECT = 0.3  # blocks are between 0.3 and 1 / 0.3 times as high as they are wide
BLOCKS = 8  # blocks drawn per crop
PURPOSE = 0x6D61736B  # the key after the seed: what the random numbers are for
COUNT, PATCH, BLOCK = range(3)  # the key after the crop
TIE = 0.2  # times a uniform number: the order of patches that are equally far from a block's center

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, in int64


def block_masks_fwd(
    first: Tensor, counts: Tensor, seed: int, views: int, height: int, width: int, blocks: bool
) -> Tensor:
    """Takes the arguments of `patchlight::block_masks_fwd`. Stable sorts: ties go to the lower index."""
    batch, number, device = len(counts) // max(1, views), height * width, counts.device
    if not batch:
        return counts.new_empty(views, 0, number, dtype=torch.bool)
    sample = first + torch.arange(batch, device=device)
    view = torch.arange(views, device=device).unsqueeze(1)
    crop = random_bits(device, seed, PURPOSE, sample, view).flatten()
    count = counts[_uniform(crop, COUNT).argsort(stable=True)]
    order = _uniform(crop.unsqueeze(1), PATCH, torch.arange(number, device=device))
    if blocks:
        order = _block_order(crop, count, height, width) + TIE * order  # the random part only breaks ties
    rank = order.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count.unsqueeze(1)).view(views, batch, number)


def _block_order(crop: Tensor, count: Tensor, height: int, width: int) -> Tensor:
    """[M, N] the order in which patches are masked: block after block, each from its center outwards."""
    draw = _uniform(crop.unsqueeze(1), BLOCK, torch.arange(4 * BLOCKS, device=crop.device)).view(-1, 4, BLOCKS)
    smallest = float((min(height, width) // 3) ** 2)
    area = smallest + draw[:, 0] * (count.unsqueeze(1) - smallest)
    aspect = torch.exp(((2 * draw[:, 1] - 1) * -math.log(MIN_ASPECT)).double()).float()
    rows, top = _place_side(torch.sqrt(area * aspect), height, draw[:, 2])
    columns, left = _place_side(torch.sqrt(area / aspect), width, draw[:, 3])
    row_in, row_off = _inside_and_distance(height, top, rows)
    column_in, column_off = _inside_and_distance(width, left, columns)
    inside = (row_in.unsqueeze(-1) & column_in.unsqueeze(-2)).flatten(2)  # [M, BLOCKS, N]
    distance = (row_off.unsqueeze(-1) + column_off.unsqueeze(-2)).flatten(2)
    # Above any distance, so that a later block never comes before an earlier one.
    far = float(height**2 + width**2)
    offset = torch.arange(BLOCKS, device=crop.device).view(1, -1, 1) * far
    uncovered = BLOCKS * far + distance[:, :1]  # if all blocks are too small, the first one grows
    return torch.where(inside, distance + offset, uncovered).amin(dim=1)


def _place_side(length: Tensor, cells: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """A block's length along one axis, at least 1 and below the grid's, and where it begins."""
    length = length.round().clamp(1, max(1, cells - 1))
    return length, torch.floor(draw * (cells - length + 1))


def _inside_and_distance(cells: int, begin: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """[M, BLOCKS, cells] whether a row or column lies in the block, and its squared distance from the middle."""
    at = torch.arange(cells, device=begin.device, dtype=begin.dtype)
    begin, length = begin.unsqueeze(-1), length.unsqueeze(-1)
    return (at >= begin) & (at < begin + length), (at - begin - (length - 1) / 2).square()


def random_bits(device: torch.device | str, *keys: Tensor | int) -> Tensor:
    """64 random bits for the keys, which are broadcast, as int64: a pure function of them (SplitMix64's finalizer)."""
    bits = torch.zeros(1, dtype=torch.int64, device=device)
    for key in keys:
        bits = _mix((bits + _GOLDEN) ^ _mix(torch.zeros_like(bits) + key + _GOLDEN))
    return bits


def _uniform(first: Tensor, *keys: Tensor | int) -> Tensor:
    """fp32 in [0, 1) for the keys, which are broadcast."""
    return (random_bits(first.device, first, *keys) >> 40 & 0xFFFFFF).float() / 0x1000000


def _mix(x: Tensor) -> Tensor:
    """The SplitMix64 finalizer in int64; the masks turn its arithmetic shifts into logical ones."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def purpose_bits(seed: int) -> int:
    """`random_bits(seed, PURPOSE)` as a Python number, for kernels that go on from there."""
    bits = 0
    for key in (seed, PURPOSE):
        bits = _mix_number((bits + _GOLDEN) ^ _mix_number(key + _GOLDEN))
    return bits - (1 << 64) if bits >> 63 else bits


def _mix_number(x: int) -> int:
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
