"""The numbers that change from step to step, on the device: written once per step, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..checks import check
from ..records import Clock, Now

FIRST_IMAGE = "first_image"  # of the step's first batch on the first rank


class StepValues:
    """One small tensor, which every step reads at the same place. fp64 holds image counts exactly, up to 2^53."""

    def __init__(
        self, schedule: Callable[[Clock], Mapping[str, float]], clock: Clock, device: torch.device, batch: int
    ) -> None:
        """schedule: the numbers of the next step, always under the same names. batch: images of a batch on a rank."""
        self.schedule, self.clock, self.batch = schedule, clock, batch
        self.names = (FIRST_IMAGE, *schedule(clock))
        self.record = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.values = dict(zip(self.names, self.record.unbind(), strict=True))

    def write(self, clock: Clock) -> dict[str, float]:
        """Writes the numbers of the next step to the device; returns them."""
        numbers, self.clock = self.schedule(clock), clock
        got = (FIRST_IMAGE, *numbers)
        check(got == self.names, f"Every step must have the same numbers, {self.names}", got, "give all in schedule()")
        row = [float(clock.images_seen), *numbers.values()]
        # From pinned memory, which PyTorch does not use again before the copy is done.
        on_gpu = self.record.device.type == "cuda"
        host = torch.tensor(row, dtype=torch.float64, pin_memory=on_gpu)
        self.record.copy_(host, non_blocking=True)
        return dict(numbers)

    def now(self, number: int, rank: int, world: int) -> Now:
        """The numbers for a batch of the step, of which it is the one with this number."""
        clock = self.clock.at_batch(number, rank, world, self.batch)
        images_before = (number * world + rank) * self.batch
        return Now(self.values, self.values[FIRST_IMAGE].long() + images_before, clock)
