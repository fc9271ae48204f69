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

from patchlight_kernels import block_masks

from ..checks import check, check_choice
from ..compiled import constant_when_compiled

SHAPES = ("block", "random")
MIN_ASPECT = 0.3  # blocks are between 0.3 and 1 / 0.3 times as high as they are wide
ATTEMPTS = 10  # failures in a row after which the released method stops


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
    on_host: ClassVar[bool] = True  # it gets the first sample's number as a Python number

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
    on_host: ClassVar[bool] = False  # the first sample's number may be on the device

    def rows(self, views: int, batch: int, grid: tuple[int, int]) -> int:
        """The number of masked patches in every batch."""
        return _total_count(self.rule.ratios, views * batch, grid[0] * grid[1])

    def __call__(
        self, first: int | Tensor, views: int, batch: int, grid: tuple[int, int], device: torch.device | str
    ) -> Tensor:
        """[V, B, N] bool for the samples first .. first + batch - 1, view by view."""
        if not isinstance(first, Tensor):
            first = torch.full((), first, dtype=torch.int64, device=device)
        sizes = self.rule.ratios, views * batch, grid[0] * grid[1], first.device
        counts = (
            _kept_counts(*sizes) if type(first) is Tensor else _new_counts(*sizes)
        )  # a fake tensor must not be kept
        return block_masks(first, counts, grid, views, self.seed, self.rule.shape)


@lru_cache(maxsize=64)
def _even_counts(ratios: tuple[tuple[float, float], ...], crops: int, number: int) -> tuple[int, ...]:
    """The number of masked patches of each of `crops` crops, before they are shuffled."""
    counts = []
    for entry, (mean, spread) in enumerate(ratios):
        share = (crops - entry + len(ratios) - 1) // len(ratios)
        counts += [int(number * (mean + spread * ((2 * i + 1) / share - 1)) + 1e-9) for i in range(share)]
    return tuple(counts)


@constant_when_compiled
def _total_count(ratios: tuple[tuple[float, float], ...], crops: int, number: int) -> int:
    return sum(_even_counts(ratios, crops, number))


def _new_counts(ratios: tuple[tuple[float, float], ...], crops: int, number: int, device: torch.device) -> Tensor:
    """_even_counts on the device: a copy that waits for it."""
    return torch.tensor(_even_counts(ratios, crops, number), dtype=torch.int32, device=device)


_cached_counts = lru_cache(maxsize=64)(_new_counts)


@constant_when_compiled
def _kept_counts(ratios: tuple[tuple[float, float], ...], crops: int, number: int, device: torch.device) -> Tensor:
    """The same, copied once; a compiled step has it as a constant."""
    return _cached_counts(ratios, crops, number, device)
