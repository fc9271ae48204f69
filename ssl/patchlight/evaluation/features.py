"""Features of every image of a source, once and in order, a share per process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_numbers
from .encoder import Encoder, autocast
from .images import CenterBatches, CenterCrops, Images, Unreadable, check_some, readable
from .progress import progress
from .ranks import Ranks


@dataclass(frozen=True)
class Reading:
    """How images are read for an evaluation."""

    batch: int = 256
    """Images per forward pass of the backbone."""
    workers: int = min(4, len(os.sched_getaffinity(0)))  # more than processors, and torch warns
    """Processes that read ahead, per rank, by default 4 or as many as processors; 0 reads in the evaluating process."""
    precision: str = "fp32"
    """fp32 or bf16: the format of the backbone's forward pass."""

    def __post_init__(self) -> None:
        check_numbers(self, batch="[1, inf)", workers="[0, inf)")
        check_choice("Reading.precision", self.precision, ("fp32", "bf16"))


@torch.no_grad()
def encode_batches(
    encoder: Encoder,
    source: Images,
    ranks: Ranks,
    reading: Reading,
    resize_to: int,
    size: int,
    unreadable: Unreadable,
    title: str = "features",
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(summaries [B, D] fp32 on the device, numbers [B] in the source) of the readable images of this rank's share."""
    crops = CenterCrops(source, ranks.share(len(source)), size, resize_to)
    loader = CenterBatches(crops, reading.batch, reading.workers, ranks.device.type == "cuda")
    for images, numbers in readable(progress(loader, title, ranks), source, unreadable):
        pixels = encoder.normalize(images.to(ranks.device, non_blocking=True))
        with autocast(ranks.device, reading.precision):
            summary = encoder(pixels).summary
        yield summary.float(), numbers.numpy()


def encode(
    encoder: Encoder,
    source: Images,
    ranks: Ranks,
    reading: Reading,
    resize_to: int,
    size: int,
    unreadable: Unreadable,
    title: str = "features",
) -> tuple[Tensor, Tensor]:
    """Of all readable images in their order, on the CPU of every rank: summaries [n, D] fp32, numbers in the source [n]."""
    batches = encode_batches(encoder, source, ranks, reading, resize_to, size, unreadable, title)
    mine = [(summary.cpu(), torch.from_numpy(numbers)) for summary, numbers in batches]
    parts = [pair for part in ranks.gather(mine) for pair in part]
    check_some(len(parts), source)
    summaries, numbers = (torch.cat(column) for column in zip(*parts, strict=True))
    order = numbers.argsort()
    return summaries[order], numbers[order]
