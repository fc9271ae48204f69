"""The processes that share an evaluation: each takes every world-th image, so none is padded and none is seen twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun; alone without it."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def share(self, count: int) -> np.ndarray:
        """This rank's numbers among 0..count-1; together the ranks have each exactly once."""
        return np.arange(self.rank, count, self.world)

    def gather(self, mine: object) -> list:
        """What every rank has, in the order of the ranks."""
        if self.world == 1:
            return [mine]
        all_of_them: list = [None] * self.world
        dist.all_gather_object(all_of_them, mine)
        return all_of_them

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def ranks(device: str | None = None) -> Iterator[Ranks]:
    """The processes that torchrun started, a GPU each where there are GPUs."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"The device must exist, got {wanted} on a machine without a usable GPU; use cpu.")
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(wanted)
    if world == 1:
        yield Ranks(wanted)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if wanted.type == "cuda" else "gloo")
    try:
        yield Ranks(wanted, dist.get_rank(), world)
        dist.barrier()  # a gloo thread that still wants the interpreter while it shuts down aborts the process
    finally:
        dist.destroy_process_group()
