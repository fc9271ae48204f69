"""The mean of gradients over replicas, each of which holds the whole student; FSDP2 does it where the student is sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

BUCKET = 32 * 2**20  # bytes of gradients that are sent together
ALIGNED = 4  # each gradient starts at a multiple of so many numbers, for kernels that read 16 bytes at once


class GradientMean:
    """Sends gradients bucket by bucket while the backward goes on, and waits for the device never.

    Only plain collectives on static memory, so a CUDA graph can record them. On one process it does nothing.
    """

    def __init__(self, student: nn.Module, world: int) -> None:
        self.student, self.world = student, world
        self.buckets: list[Bucket] = []
        self.sent = 0  # buckets; always in the same order, so that all ranks send the same one
        self.last = True
        if world == 1 or isinstance(student, FSDPModule):
            return
        for parameters in in_buckets(student):
            self.add_bucket(parameters)

    def add_bucket(self, parameters: list[nn.Parameter]) -> None:
        bucket = Bucket(parameters)
        self.buckets.append(bucket)

        def arrived(parameter: Tensor) -> None:
            if self.last:
                bucket.missing -= 1
                self.send(complete=True)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    def begin(self, last: bool) -> None:
        """Before the backward of a batch; gradients are sent in that of a step's last one."""
        self.last, self.sent = last, 0
        for bucket in self.buckets:
            bucket.begin()
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(last)

    def send(self, complete: bool) -> None:
        """Sends the next buckets: those that are complete, or all."""
        while self.sent < len(self.buckets) and not (complete and self.buckets[self.sent].missing):
            self.buckets[self.sent].send()
            self.sent += 1

    def finish(self) -> None:
        """After the last backward: all gradients are means over the replicas."""
        self.send(complete=False)  # a parameter that no loss depends on has no gradient, on any rank
        for bucket in self.buckets:
            bucket.receive(self.world)


def in_buckets(student: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters whose gradients are sent together, in the order in which gradients come: from the last to the first."""
    buckets: list[list[nn.Parameter]] = []
    full = BUCKET
    for parameter in reversed([p for p in student.parameters() if p.requires_grad]):
        if full >= BUCKET:
            buckets.append([])
            full = 0
        buckets[-1].append(parameter)
        full += parameter.numel() * parameter.element_size()
    return buckets


def padded_lengths(parameters: list[nn.Parameter]) -> list[int]:
    """How many numbers each gradient takes in its bucket."""
    return [-(-p.numel() // ALIGNED) * ALIGNED for p in parameters]


class Bucket:
    """Gradients that are sent together, in memory of their own."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.missing = parameters, len(parameters)
        lengths = padded_lengths(parameters)
        self.flat = parameters[0].new_zeros(sum(lengths), requires_grad=False)
        self.gradients = [
            part[: p.numel()].view(p.shape) for part, p in zip(self.flat.split(lengths), parameters, strict=True)
        ]
        self.work: dist.Work | None = None

    def begin(self) -> None:
        """Forgets a backward that did not end, as a recording that failed."""
        self.missing, self.work = len(self.parameters), None

    @torch.no_grad()
    def send(self) -> None:
        here = [(slot, p.grad) for slot, p in zip(self.gradients, self.parameters, strict=True) if p.grad is not None]
        if here:
            torch._foreach_copy_([slot for slot, _ in here], [gradient for _, gradient in here])
            self.work = dist.all_reduce(self.flat, async_op=True)

    @torch.no_grad()
    def receive(self, world: int) -> None:
        if self.work is None:
            return
        self.work.wait()
        self.flat /= world
        for slot, parameter in zip(self.gradients, self.parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad = slot
