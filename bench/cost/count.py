"""Counts one training step on a fake GPU: every kernel, with the phase of the step that launches it."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from patchlight.backbones import positions
from patchlight.data import masking
from patchlight.data.interface import Loader
from patchlight.engine import assembly
from patchlight.engine.parallel import Mesh
from patchlight.engine.trainer import Trainer
from patchlight.run import Run

from ..methods import LastLoss, SyntheticLoader, build_official
from ..official_step import OfficialStep
from .compiled import compile_branch, compile_function, compiler_sees_a_gpu
from .fake_gpu import GPU, fake_gpu
from .kernels import kernels_of
from .records import BACKWARD, CUE, OBJECTIVE, REST, STUDENT, TEACHER, WAITS, Call, Kernel, Launch


class Counter(TorchDispatchMode):
    """Collects the kernels of every operation within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = REST
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            name = f"{function.namespace}.{function._schema.name.split('::')[1]}"
            names = tuple(argument.name for argument in function._schema.arguments)
            written = frozenset(
                argument.name
                for argument in function._schema.arguments
                if argument.alias_info is not None and argument.alias_info.is_write
            )
            call = Call(name, args, kwargs or {}, result, names, written)
            for kernel in kernels_of(call):
                self.add(kernel)
        return result

    def add(self, kernel: Kernel) -> None:
        self.launches.append(Launch(self.phase, kernel, own_line() if kernel.kind in WAITS else ""))

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watch(self, phase: str, call: Callable) -> Callable:
        """The call, whose operations belong to the phase."""

        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return call(*args, **kwargs)

        return counted

    def watched(self, owner: Any, name: str, phase: str) -> AbstractContextManager:
        """Within the block, what the owner's function of that name does belongs to the phase."""
        return mock.patch.object(owner, name, self.watch(phase, getattr(owner, name)))


def own_line() -> str:
    """The line of our packages that is running."""
    frames = [frame for frame in traceback.extract_stack() if "/patchlight" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def empty_resize_matrix(
    source: tuple[int, int], target: tuple[int, int], resize: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty(target[0] * target[1], source[0] * source[1], dtype=dtype, device=device)


def empty_counts(ratios: tuple, crops: int, number: int, device: torch.device) -> Tensor:
    return torch.empty(crops, dtype=torch.int32, device=device)


# What is copied to the device once, before the steps that count; the fake GPU has no values to keep.
CONSTANTS = (
    (positions, "resize_matrix", empty_resize_matrix),
    (masking, "_kept_counts", empty_counts),
    (masking, "_new_counts", empty_counts),
)


def build_trainer(run: Run) -> Trainer:
    """The trainer of a run on the fake GPU, one process."""
    with mock.patch.object(
        assembly, "check_teacher_student", lambda *_: None
    ):  # compares addresses, which there are none of
        loader = cast("Loader", SyntheticLoader(run, GPU))
        return assembly.build_trainer(run, Mesh(GPU), loader=loader, metrics=LastLoss())


def as_on_a_gpu(run: Run) -> Run:
    """In bf16, operation by operation: neither compiled nor captured, which only a real GPU can be."""
    settings: dict[str, Any] = {"precision": "bf16", "compile": "off", "graph": "off"}
    known = {field.name for field in fields(run.parallel)}
    chosen = {name: value for name, value in settings.items() if name in known}
    return replace(run, parallel=replace(run.parallel, **chosen))


def count_step(run: Run, compiled: bool = False) -> list[Launch]:
    """The launches of the second training step of a run: the first one also makes the optimizer's state, and compiles.

    compiled: branches, cues, losses and the update's small functions as whole graphs; else operation by operation.
    """
    counter = Counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_gpu())
        for where, name, empty in CONSTANTS:
            stack.enter_context(mock.patch.object(where, name, empty))
        trainer = build_trainer(as_on_a_gpu(run))
        if compiled:
            stack.enter_context(compiler_sees_a_gpu(counter.add))
            compile_branch(trainer.teacher, functools.partial(counter.watch, TEACHER))
            compile_branch(trainer.student, functools.partial(counter.watch, STUDENT))
            compile_branch(trainer.objectives, functools.partial(counter.watch, OBJECTIVE))
            compile_function(trainer.objectives, "cue", functools.partial(counter.watch, CUE))
            for name in ("_find_bad", "_judge"):
                compile_function(trainer.update, name, functools.partial(counter.watch, REST))
        else:
            stack.enter_context(counter.watched(trainer.objectives, "cue", CUE))
            stack.enter_context(counter.watched(trainer.objectives, "forward", OBJECTIVE))
            stack.enter_context(counter.watched(trainer.teacher, "forward", TEACHER))
            stack.enter_context(counter.watched(trainer.student, "forward", STUDENT))
        stack.enter_context(counter.watched(torch.Tensor, "backward", BACKWARD))
        batches = [next(trainer.loader) for _ in range(run.parallel.accumulate)]
        trainer.device_step(batches)
        counter.launches.clear()
        with counter:
            trainer.device_step(batches)
    return counter.launches


def count_official(kind: type[OfficialStep], run: Run) -> list[Launch]:
    """The launches of the second official step on the same crops; its phases are the backward and all else."""
    counter = Counter()
    with fake_gpu(), counter.watched(torch.Tensor, "backward", BACKWARD):
        trainer = build_trainer(as_on_a_gpu(run))
        official, views = build_official(kind, trainer), next(trainer.loader)
        with torch.autocast(GPU.type, torch.bfloat16):
            official.step(views)
            with counter:
                official.step(views)
    return counter.launches
