"""MoBY: the student's query of one view must match the teacher's key of the other among a queue of earlier images' keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check
from ..heads.contrast import ContrastHead
from ..records import Cues, Now, Side, Views
from .contrast import check_contrast_options, cross_entropy, gather_rows, ordered_pairs, queries_and_keys, unit_rows
from .interface import BuildContext, Needs, Objective, ObjectiveOptions


@dataclass(frozen=True, slots=True)
class MobyOptions(ObjectiveOptions):
    """The defaults are those of the released recipe. Projector and predictor have biases, and no norm at the end.

    The released code differs: it updates the teacher at the start of the next step, with that step's momentum (one
    step ahead of ours); and a resumed run starts its momentum's schedule again, while ours continues.
    """

    queue: int = 4096
    """Keys kept per view; the global batch must divide it."""
    temperature: float = 0.2
    """By which cosines are divided before the softmax."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    out: int = 256
    """Width of what projector and predictor return."""
    layers: int = 2
    """Layers of the projector."""
    predictor_layers: int = 2
    """Layers of the predictor."""

    def __post_init__(self) -> None:
        check_contrast_options(self)

    def build(self, context: BuildContext) -> Moby:
        return Moby(self)


class Moby(Objective):
    """The term "moby/contrast": the sum over both directions of the cross-entropy over a query's own key and the queue.

    A step uses the keys of earlier steps; its own, of all its batches and ranks, are added after it. So all accumulated
    batches use the same queue, and a refused step adds no keys.
    """

    name = "moby"
    terms = ("moby/contrast",)
    queue: Tensor
    oldest: Tensor
    new_keys: Tensor
    new_count: Tensor

    def __init__(self, options: MobyOptions | None = None) -> None:
        super().__init__()
        self.options = o = options or MobyOptions()
        self.register_buffer("queue", unit_rows(torch.randn(2, o.queue, o.out)))  # [view, keys, D]
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))  # the next place to be overwritten
        self.register_buffer("new_keys", torch.zeros_like(self.queue), persistent=False)  # of this step's batches
        self.register_buffer("new_count", torch.zeros_like(self.oldest), persistent=False)  # their number

    def needs(self) -> Needs:
        return Needs(global_crops=2, separate_views=True, batch_norm=True, batch_divides=self.options.queue)

    def head(self, width: int) -> nn.Module:
        return moby_head(width, self.options.layers, self.options)

    def predictor(self, width: int) -> nn.Module:
        return moby_head(self.options.out, self.options.predictor_layers, self.options)

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        queries, keys = queries_and_keys(self.name, student, teacher)
        check(len(keys) == 2, "moby: there must be two views, each with its queue", len(keys), "use two global crops")
        self.keep(gather_rows(keys)[0])
        return {"moby/contrast": self.contrast(queries, keys)}

    def contrast(self, queries_VBD: Tensor, keys_VBD: Tensor) -> Tensor:
        """The loss of normalized queries and keys."""
        place = torch.zeros(queries_VBD.shape[1], dtype=torch.int64, device=queries_VBD.device)
        losses = []
        with torch.autocast(queries_VBD.device.type, enabled=False):
            for q, k in ordered_pairs(len(self.queue)):
                own = (queries_VBD[q] * keys_VBD[k]).sum(dim=-1, keepdim=True)
                logits = torch.cat([own, queries_VBD[q] @ self.queue[k].T], dim=1)
                losses.append(cross_entropy(logits / self.options.temperature, place))
        return losses[0] + losses[1]

    @torch.no_grad()
    def keep(self, keys: Tensor) -> None:
        """Keeps a batch's keys [view, keys, D] of all ranks until the step is done."""
        number, length = keys.shape[1], self.options.queue
        check(number <= length, "moby: the queue must hold a batch of all ranks", f"{number} keys", "enlarge the queue")
        place = self.new_count + torch.arange(number, device=keys.device)
        self.new_keys.index_copy_(1, place, keys.to(self.new_keys.dtype))
        self.new_count += number

    @torch.no_grad()
    def after_step(self) -> None:
        """The new keys take the places of the oldest ones; how many there are is never read on the host."""
        number = torch.arange(self.options.queue, device=self.queue.device)
        place = (self.oldest + number) % self.options.queue
        is_new = (number < self.new_count)[:, None]
        self.queue.index_copy_(1, place, torch.where(is_new, self.new_keys, self.queue[:, place]))
        self.oldest.copy_((self.oldest + self.new_count) % self.options.queue)
        self.new_count.zero_()


def moby_head(width: int, layers: int, options: Any) -> ContrastHead:
    """MoBY's projection or prediction, also used by SelfPatch with negatives: with biases, no norm at the end."""
    return ContrastHead(width, options.hidden, options.out, layers, bias=True, last_norm=False)
