"""What a training step sends between processes: each collective with its purpose, its group and its bytes.

Parameters and gradients by formulas from the modules that are sharded one by one (`patchlight.engine.parallel.shard`), the
objectives' own messages as one process would send them. Tests compare both with real runs of 2 and 4 processes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patchlight.engine.branches import Branch
from patchlight.engine.gradients import in_buckets, padded_lengths
from patchlight.engine.trainer import Trainer
from patchlight.heads.projection import ProjectionHead
from patchlight.heads.prototypes import Prototypes

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
GRADIENTS, WEIGHTS, NORMS, STATISTICS, OBJECTIVES = PURPOSES = (
    "gradients", "weights", "norms and refusal", "BatchNorm", "objectives",
)  # fmt: skip
REPLICATE, SHARD, EVERYONE = "replicate", "shard", "all"


@dataclass(frozen=True)
class Message:
    """A collective. `bytes` is what a rank puts in or gets out, whichever is more; how much goes over wires follows from it."""

    purpose: str
    kind: str
    group: str
    bytes: int


@dataclass(frozen=True)
class Unit:
    """A module that is gathered and freed by itself."""

    name: str
    shapes: tuple[torch.Size, ...]  # of its own parameters
    trained: tuple[torch.Size, ...]  # of those that get a gradient
    calls: int  # in a step
    nested: int  # calls besides, from within calls

    def bytes(self, shard: int, trained: bool = False) -> int:
        """In fp32, every tensor padded to equal shards along its first dimension."""
        shapes = self.trained if trained else self.shapes
        return 4 * sum(ceil(shape[0] / shard) * shard * prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class StepTraffic:
    """What the messages follow from; it does not depend on the number of processes."""

    student: list[Unit]
    teacher: list[Unit]
    checked: int  # numbers that must be finite: the terms, and a norm for each trainable parameter
    norms: int
    buckets: list[int]  # bytes of gradients that replicas send together
    own_messages: list[Message]  # of the objectives
    batch_norms: list[tuple[int, bool]]  # channels of every call, and whether it has a backward

    def messages(self, replicate: int, shard: int, gpu: bool = True) -> Iterator[Message]:
        """Of one process in a step, in no order."""
        world = replicate * shard
        if shard == 1 and replicate > 1:
            for size in self.buckets:
                yield Message(GRADIENTS, ALL_REDUCE, EVERYONE, size)
        if shard > 1:
            for unit in self.student:
                if size := unit.bytes(shard, trained=True):
                    yield Message(GRADIENTS, REDUCE_SCATTER, SHARD, size)
                    if replicate > 1:
                        yield Message(GRADIENTS, ALL_REDUCE, REPLICATE, size // shard)
            for units, trained in ((self.student, True), (self.teacher, False)):
                for unit in units:
                    for _ in range(gathers(unit, trained)):
                        yield Message(WEIGHTS, ALL_GATHER, SHARD, unit.bytes(shard))
        if world == 1:
            return
        if shard > 1:
            yield Message(NORMS, ALL_REDUCE, SHARD, 4 * self.norms)
        yield Message(NORMS, ALL_REDUCE, EVERYONE, 4 * self.checked)
        yield from self.own_messages
        for channels, has_backward in self.batch_norms:
            yield from batch_norm_messages(channels, has_backward, world, gpu)


def gathers(unit: Unit, trained: bool) -> int:
    """How often a unit is gathered in a step.

    The teacher's units are freed after every call. A block of the student is too, and is gathered again for the backward of
    each call. The student's other units are kept until their first backward; each further one, also of nested calls, gathers
    again.
    """
    if not trained:
        return unit.calls
    return 2 * unit.calls if unit.name.startswith("backbone.blocks.") else unit.calls + unit.nested


def batch_norm_messages(channels: int, has_backward: bool, world: int, gpu: bool) -> Iterator[Message]:
    """On a GPU those of torch's SyncBatchNorm: mean, inverse deviation and count of every rank; then two sums."""
    if gpu:
        yield Message(STATISTICS, ALL_GATHER, EVERYONE, 4 * world * (2 * channels + 1))
        if has_backward:
            yield Message(STATISTICS, ALL_REDUCE, EVERYONE, 4 * 2 * channels)
        return
    for _ in range(1 + has_backward):
        yield Message(STATISTICS, ALL_REDUCE, EVERYONE, 4 * (channels + 1))
        yield Message(STATISTICS, ALL_REDUCE, EVERYONE, 4 * channels)


def traffic_of(trainer: Trainer) -> StepTraffic:
    """From one step of a trainer that is alone, and has made a step before."""
    calls = Calls(set(trainer.student.modules()))
    own: list[Message] = []
    with_gradient: set[Tensor] = set()
    terms: dict[str, Tensor] = {}
    original = trainer.update.step

    def all_reduce(values: Tensor, *_: Any, **__: Any) -> None:
        own.append(Message(OBJECTIVES, ALL_REDUCE, EVERYONE, values.numel() * values.element_size()))

    def update(values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        terms.update(values)
        with_gradient.update(p for p in trainer.student.parameters() if p.grad is not None)
        return original(values, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for branch in (trainer.student, trainer.teacher):
            for module in branch.modules():
                stack.enter_context(calls.counted(module))
        stack.enter_context(mock.patch.object(dist, "is_initialized", lambda: True))
        stack.enter_context(mock.patch.object(dist, "get_world_size", lambda *_: 1))
        stack.enter_context(mock.patch.object(dist, "all_reduce", all_reduce))
        stack.enter_context(mock.patch.object(trainer.update, "step", update))
        trainer.device_step([next(trainer.loader) for _ in range(trainer.run.parallel.accumulate)])
    norms = sum(p.requires_grad for p in trainer.student.parameters())
    student, teacher = (units_of(branch, calls, with_gradient) for branch in (trainer.student, trainer.teacher))
    buckets = [4 * sum(padded_lengths(parameters)) for parameters in in_buckets(trainer.student)]
    return StepTraffic(student, teacher, norms + len(terms), norms, buckets, own, calls.batch_norms)


class Calls:
    """Counts the calls of modules; of Prototypes also those of the methods that FSDP2 treats as calls."""

    def __init__(self, trained: set[nn.Module]) -> None:
        self.trained = trained
        self.outer: Counter[nn.Module] = Counter()
        self.nested: Counter[nn.Module] = Counter()
        self.inside: Counter[nn.Module] = Counter()
        self.batch_norms: list[tuple[int, bool]] = []

    @contextlib.contextmanager
    def counted(self, module: nn.Module) -> Iterator[None]:
        names = ("forward", "directions", "logits") if isinstance(module, Prototypes) else ("forward",)
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(mock.patch.object(module, name, self.counting(module, getattr(module, name))))
            yield

    def counting(self, module: nn.Module, call: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            (self.nested if self.inside[module] else self.outer)[module] += 1
            if isinstance(module, _BatchNorm):
                self.batch_norms.append((module.num_features, module in self.trained))
            self.inside[module] += 1
            try:
                return call(*args, **kwargs)
            finally:
                self.inside[module] -= 1

        return counted


def units_of(branch: Branch, calls: Calls, with_gradient: set[Tensor]) -> list[Unit]:
    """As the engine shards a branch: blocks, heads and predictors with what is called directly in them, then the rest."""
    tops = [*branch.heads.values(), *branch.predictors.values()]
    parts = [module for top in tops for module in top.modules() if module is top or is_unit(module)]
    modules = dict.fromkeys([*branch.backbone.blocks, *parts, branch])
    names = {module: name for name, module in branch.named_modules()}
    units = []
    for module in modules:
        own = [p for part in without(module, modules.keys() - {module}) for p in part.parameters(recurse=False)]
        if own:
            trained = tuple(p.shape for p in own if p in with_gradient)
            counts = calls.outer[module], calls.nested[module]
            units.append(Unit(names[module], tuple(p.shape for p in own), trained, *counts))
    return units


def is_unit(module: nn.Module) -> bool:
    return isinstance(module, Prototypes | ProjectionHead)


def without(module: nn.Module, others: set[nn.Module]) -> Iterator[nn.Module]:
    """The module and its parts, but nothing of the others."""
    yield module
    for child in module.children():
        if child not in others:
            yield from without(child, others)
