"""The processes that share an evaluation. Each takes every world-th image, so no image is padded or counted twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun; the only one without torchrun."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def share(self, count: int) -> np.ndarray:
        """This rank's numbers among 0..count-1; each number belongs to exactly one rank."""
        return np.arange(self.rank, count, self.world)

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in the order of the ranks."""
        if self.world == 1:
            return [mine]
        gathered: list = [None] * self.world
        dist.all_gather_object(gathered, mine)
        return gathered

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def join_ranks(device: str | None = None) -> Iterator[Ranks]:
    """The processes that torchrun started, with one GPU each where there are GPUs."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check(
        chosen.type != "cuda" or torch.cuda.is_available(),
        "The device must exist",
        f"{chosen} on a machine without a usable GPU",
        "use cpu",
    )
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if world == 1:
        yield Ranks(chosen)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(chosen, dist.get_rank(), world)
        dist.barrier()  # a gloo thread that needs the interpreter lock during shutdown aborts the process
    finally:
        dist.destroy_process_group()
