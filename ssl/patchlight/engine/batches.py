"""The batches of each step: on a GPU the next ones are read while a step computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.interface import Loader
from ..records import Views
from ..report.step_profile import part


class Batches:
    """Takes the batches of a step from a loader. Its state is that of the first batch that was not yet taken."""

    def __init__(self, loader: Loader, count: int, device: torch.device) -> None:
        """count: batches per step."""
        self.loader, self.count, self.device = loader, count, device
        self.stream: torch.cuda.Stream | None = None  # of the reading ahead
        self.ahead: list[Views] = []
        self.state_before: dict | None = None  # the loader's, before it read ahead
        self.measured: Tensor | None = None  # root mean square of the pixels of a batch
        self.stalled = 0.0  # seconds that a step has waited for data, since this was last set to 0

    def __iter__(self) -> Iterator[Views]:
        """The batches of the next step: those that were read ahead, or read one by one as they are needed."""
        ahead, self.ahead, self.state_before = self.ahead, [], None
        if self.stream is not None and ahead:
            stream = torch.cuda.current_stream()
            stream.wait_stream(self.stream)
            for tensor in (tensor for views in ahead for tensor in views.tensors()):
                tensor.record_stream(stream)  # else the next reading could use its memory before this step has read it
        for views in ahead:
            yield self._measure(views)
        for _ in range(self.count - len(ahead)):
            with part("data"):
                views = next(self.loader)
            self.stalled += self.loader.stall_seconds
            yield self._measure(views)

    def _measure(self, views: Views) -> Views:
        """Measures the first batch since `pixel_rms` was called, without waiting for the device."""
        if self.measured is None:
            pixels = views.global_crops.pixels
            wide = torch.promote_types(pixels.dtype, torch.float32)
            self.measured = torch.linalg.vector_norm(pixels, dtype=wide) / pixels.numel() ** 0.5
        return views

    def pixel_rms(self) -> float:
        """Root mean square of the pixels of a batch since the last call: about 1 if they are normalized. Waits."""
        measured, self.measured = self.measured, None
        return math.nan if measured is None else measured.item()

    def read_ahead(self) -> None:
        """Reads the next step's batches while the GPU does what it was given until now."""
        if self.device.type != "cuda":
            return
        self.stream = self.stream or torch.cuda.Stream(self.device)
        given = torch.cuda.current_stream().record_event()
        self.state_before = self.loader.state_dict()
        with torch.cuda.stream(self.stream):
            for _ in range(self.count):
                with part("data"):
                    self.ahead.append(next(self.loader))
                if given.query():  # the GPU has nothing left to do
                    self.stalled += self.loader.stall_seconds

    def state_dict(self) -> dict:
        """All ranks must call this: what differs between them is put together, as one of them writes it."""
        state = self.loader.state_dict() if self.state_before is None else self.state_before
        if "of_rank" in state and dist.is_initialized():
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, state["of_rank"])
            state = state | {"of_ranks": of_ranks}
        return state
