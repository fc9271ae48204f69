"""Which patches are hidden from the student: pure functions of a seed and the samples' running numbers.

A sample's running number counts images over the whole run and all ranks, so the masks of a run do not depend on how its
batches are split over ranks and micro-batches, and a resumed run continues with the masks it would have had.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check, check_choice

SHAPES = ("block", "random")
MIN_ASPECT = 0.3  # blocks are between 0.3 and 1 / 0.3 times as high as they are wide
ATTEMPTS = 10  # failures in a row after which the released method stops
BLOCKS = 8  # blocks drawn per crop where the number of masked patches is fixed

MASKS = 0x6D61736B  # the key after the seed: the purpose of the random numbers (random_numbers.py)
COUNT, PATCH, BLOCK = range(3)  # the key after the crop

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, in int64


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How much of a crop is masked, and in which shape.

    ratios: (mean, spread) pairs; each crop has one of them, and its ratio lies in mean - spread .. mean + spread.
        ((0.3, 0.0),) is the released default of iBOT; ((0.0, 0.0), (0.3, 0.2)) its published ViT-S command and its
        paper: half of the crops unmasked, 10 to 50 percent of the others.
    shape: "block" or "random" (single patches).
    """

    ratios: tuple[tuple[float, float], ...] = ((0.3, 0.0),)
    shape: str = "block"

    def __post_init__(self) -> None:
        check_choice("MaskRule.shape", self.shape, SHAPES)
        for mean, spread in self.ratios:
            check(
                0 <= spread <= mean <= 1 - spread,
                "MaskRule.ratios: mean - spread and mean + spread must lie in 0..1",
                f"{mean} and {spread}",
                "use a smaller spread",
            )
        some = any(mean for mean, _ in self.ratios)
        check(some, "MaskRule.ratios: some ratio must be above 0", self.ratios, "((0.3, 0.0),) is as released")


@dataclass(frozen=True, slots=True)
class ReleasedMasks:
    """The masks of the released iBOT code: every crop draws its own ratio, so the number of masked patches varies.

    Blocks are placed one after the other, each no larger than what is still missing; ten failures in a row end the
    crop, so its ratio is a little below the wanted ratio. Runs on the host, some 50 microseconds per crop. The distribution
    is as released, the random stream is not; and no masks are drawn for local crops, where they were never used.
    """

    rule: MaskRule = MaskRule()
    seed: int = 0
    on_host: ClassVar[bool] = True

    def rows(self, views: int, batch: int, grid: tuple[int, int]) -> int:
        """The largest number of masked patches in any batch."""
        return views * batch * max(int((mean + spread) * grid[0] * grid[1]) for mean, spread in self.rule.ratios)

    def __call__(self, first: int, views: int, batch: int, grid: tuple[int, int], device: torch.device | str) -> Tensor:
        """[V, B, N] bool for the samples first .. first + batch - 1, view by view."""
        drawn = [self.patch_bits(first + image, view, grid) for view in range(views) for image in range(batch)]
        mask = unpack_bits(drawn, grid[0] * grid[1]).view(views, batch, -1)
        return mask.to(device, non_blocking=True)

    def patch_bits(self, sample: int, view: int, grid: tuple[int, int]) -> int:
        """The masked patches of a crop as the bits of a number, patch 0 lowest."""
        stream = random.Random(f"{self.seed} {sample} {view}")
        ratio = stream.choice([stream.uniform(m - s, m + s) if s else m for m, s in self.rule.ratios])
        number = grid[0] * grid[1]
        if self.rule.shape == "random":
            return sum(1 << patch for patch in stream.sample(range(number), int(ratio * number)))
        return _released_blocks(stream, ratio * number, grid)


def unpack_bits(masks: list[int], number: int) -> Tensor:
    """Masks stored as the bits of numbers, as [len(masks), number] bool."""
    width = (number + 7) // 8
    packed = torch.frombuffer(bytearray(b"".join(c.to_bytes(width, "little") for c in masks)), dtype=torch.uint8)
    bits = packed.view(len(masks), width, 1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, :number].bool()


def _released_blocks(stream: random.Random, wanted: float, grid: tuple[int, int]) -> int:
    """Places blocks until `wanted` patches (a real number) are masked, or as close to it as they get."""
    smallest, widest = (min(grid) // 3) ** 2, -math.log(MIN_ASPECT)
    masked = block = count = failures = 0
    while count < wanted and failures < ATTEMPTS:
        area = stream.uniform(smallest, wanted - count)  # near the end the bounds are reversed, as released
        aspect = math.exp(stream.uniform(-widest, widest))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        new = 0
        if height < grid[0] and width < grid[1]:
            top, left = stream.randint(0, grid[0] - height), stream.randint(0, grid[1] - width)
            row_bits = ((1 << width) - 1) << left
            block = sum(row_bits << row * grid[1] for row in range(top, top + height))
            new = (block & ~masked).bit_count()
        if 0 < new <= wanted - count:
            masked, count, failures = masked | block, count + new, 0
        else:
            failures += 1
    return masked


@dataclass(frozen=True, slots=True)
class FixedMasks:
    """Masks whose number of masked patches is the same in every batch, drawn on the device without waiting for it.

    Shapes stay static, so compilation and CUDA graphs stay possible. What differs from the released method:
    - ratios are not drawn: each (mean, spread) pair gets an equal share of the batch's crops, the ratios of a pair are
      evenly spaced over its interval, and a random order decides which crop gets which ratio;
    - a crop masks exactly int(ratio * N) patches, where the released blocks stop a little earlier;
    - all blocks of a crop are drawn at once, each as large as the crop's whole count allows, and taken in order; the
      block that would exceed the count is taken from its center outwards until the count is reached.
    """

    rule: MaskRule = MaskRule()
    seed: int = 0
    on_host: ClassVar[bool] = False

    def rows(self, views: int, batch: int, grid: tuple[int, int]) -> int:
        """The number of masked patches in every batch."""
        return sum(_even_counts(self.rule.ratios, views * batch, grid[0] * grid[1]))

    def __call__(
        self, first: int | Tensor, views: int, batch: int, grid: tuple[int, int], device: torch.device | str
    ) -> Tensor:
        """[V, B, N] bool for the samples first .. first + batch - 1, view by view."""
        number = grid[0] * grid[1]
        sample = first + torch.arange(batch, device=device)
        view = torch.arange(views, device=device).unsqueeze(1)
        crop = random_bits_on(device, self.seed, MASKS, sample, view).flatten()
        count = _counts_on(self.rule.ratios, len(crop), number, device)[_uniform(crop, COUNT).argsort()]
        order = _uniform(crop.unsqueeze(1), PATCH, torch.arange(number, device=device))
        if self.rule.shape == "block":
            order = _block_order(crop, count, grid) + 0.2 * order  # the random part only breaks ties
        rank = order.argsort(dim=1).argsort(dim=1)
        return (rank < count.unsqueeze(1)).view(views, batch, -1)


@lru_cache(maxsize=64)
def _even_counts(ratios: tuple[tuple[float, float], ...], crops: int, number: int) -> tuple[int, ...]:
    """The number of masked patches of each of `crops` crops, before they are shuffled."""
    counts = []
    for entry, (mean, spread) in enumerate(ratios):
        share = (crops - entry + len(ratios) - 1) // len(ratios)
        counts += [int(number * (mean + spread * ((2 * i + 1) / share - 1)) + 1e-9) for i in range(share)]
    return tuple(counts)


@lru_cache(maxsize=64)
def _counts_on(ratios: tuple[tuple[float, float], ...], crops: int, number: int, device: torch.device | str) -> Tensor:
    """_even_counts on the device, copied there once."""
    return torch.tensor(_even_counts(ratios, crops, number), device=device)


def _block_order(crop: Tensor, count: Tensor, grid: tuple[int, int]) -> Tensor:
    """[M, N] the order in which patches are masked: block after block, each from its center outwards."""
    draw = _uniform(crop.unsqueeze(1), BLOCK, torch.arange(4 * BLOCKS, device=crop.device)).view(-1, 4, BLOCKS)
    smallest = float((min(grid) // 3) ** 2)
    area = smallest + draw[:, 0] * (count.unsqueeze(1) - smallest)
    aspect = torch.exp((2 * draw[:, 1] - 1) * -math.log(MIN_ASPECT))
    height, top = _place_side(torch.sqrt(area * aspect), grid[0], draw[:, 2])
    width, left = _place_side(torch.sqrt(area / aspect), grid[1], draw[:, 3])
    row_in, row_off = _inside_and_distance(grid[0], top, height)
    column_in, column_off = _inside_and_distance(grid[1], left, width)
    inside = (row_in.unsqueeze(-1) & column_in.unsqueeze(-2)).flatten(2)  # [M, BLOCKS, N]
    distance = (row_off.unsqueeze(-1) + column_off.unsqueeze(-2)).flatten(2)
    # Above any distance, so that a later block never comes before an earlier one.
    far = float(grid[0] ** 2 + grid[1] ** 2)
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


def random_bits_on(device: torch.device | str, *keys: Tensor | int) -> Tensor:
    """`random_numbers.random_bits` as int64, computed on a device: integers, so every device computes the same."""
    bits = torch.zeros(1, dtype=torch.int64, device=device)
    for key in keys:
        bits = _mix((bits + _GOLDEN) ^ _mix(torch.zeros_like(bits) + key + _GOLDEN))
    return bits


def _uniform(first: Tensor, *keys: Tensor | int) -> Tensor:
    """fp32 in [0, 1) for the keys, which are broadcast."""
    return (random_bits_on(first.device, first, *keys) >> 40 & 0xFFFFFF).float() / 0x1000000


def _mix(x: Tensor) -> Tensor:
    """The SplitMix64 finalizer in int64; the masks turn its arithmetic shifts into logical ones."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)
