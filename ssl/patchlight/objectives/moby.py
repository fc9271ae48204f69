"""MoBY: the student's query of one view finds the teacher's key of the other among a queue of earlier images' keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..heads.contrast import ContrastHead
from ..records import Clock, Side, Views
from .contrast import find_key, gather_rows, ordered_pairs, queries_and_keys, unit_rows
from .interface import Needs, Objective


@dataclass(frozen=True, slots=True)
class MobyOptions:
    """The defaults are those of the released recipe.

    queue: keys kept per view; the global batch must divide it.
    hidden, out, layers, predictor_layers: of projector and predictor, both with biases and no norm at the end.

    Where the released code differs: it moves the teacher at the start of the next step, with that step's momentum (one
    step ahead of ours); and a resumed run starts its momentum's schedule again, where ours goes on.
    """

    queue: int = 4096
    temperature: float = 0.2
    hidden: int = 4096
    out: int = 256
    layers: int = 2
    predictor_layers: int = 2

    def __post_init__(self) -> None:
        if self.queue < 1 or self.temperature <= 0:
            raise ValueError(
                f"MobyOptions: queue and temperature must be positive, got {self.queue} and {self.temperature}; "
                "4096 and 0.2 are usual."
            )


class Moby(Objective):
    """The term "moby/contrast": the sum over both directions of the cross-entropy over the own key and the queue.

    A step sees the keys of the steps before it; its own enter the queue when it is done, those of all its batches and
    ranks. So accumulated batches see the same queue, and a refused step leaves none.
    """

    name = "moby"

    def __init__(self, options: MobyOptions | None = None) -> None:
        super().__init__()
        self.options = o = options or MobyOptions()
        self.register_buffer("queue", unit_rows(torch.randn(2, o.queue, o.out)))  # [view, keys, D]
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))  # the next place to be overwritten
        self.arrived: list[Tensor] = []  # [view, keys, D] of this step's batches

    def needs(self) -> Needs:
        return Needs(global_crops=2, views_apart=True, batch_norm=True, batch_divides=self.options.queue)

    def head(self, width: int) -> nn.Module:
        o = self.options
        return ContrastHead(width, o.hidden, o.out, o.layers, bias=True, last_norm=False)

    def predictor(self, width: int) -> nn.Module:
        o = self.options
        return ContrastHead(o.out, o.hidden, o.out, o.predictor_layers, bias=True, last_norm=False)

    def forward(self, student: Side, teacher: Side, views: Views, clock: Clock) -> dict[str, Tensor]:
        queries, keys = queries_and_keys(self.name, student, teacher)
        if len(keys) != len(self.queue):
            raise ValueError(f"moby: it has a queue for each of two views, got {len(keys)}; use two global crops.")
        self.arrived.append(gather_rows(keys)[0])
        return {"moby/contrast": self.contrast(queries, keys)}

    def contrast(self, queries_VBD: Tensor, keys_VBD: Tensor) -> Tensor:
        """Queries and keys are normalised."""
        place = torch.zeros(queries_VBD.shape[1], dtype=torch.int64, device=queries_VBD.device)
        loss = 0.0
        with torch.autocast(queries_VBD.device.type, enabled=False):
            for q, k in ordered_pairs(len(self.queue)):
                own = (queries_VBD[q] * keys_VBD[k]).sum(dim=-1, keepdim=True)
                logits = torch.cat([own, queries_VBD[q] @ self.queue[k].T], dim=1)
                loss = loss + find_key(logits / self.options.temperature, place)
        return loss

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        keys = torch.cat(self.arrived, dim=1)
        self.arrived.clear()
        number, length = keys.shape[1], self.options.queue
        place = (self.oldest + torch.arange(number, device=keys.device)) % length
        self.queue.index_copy_(1, place, keys.to(self.queue.dtype))
        self.oldest.copy_((self.oldest + number) % length)
