"""The update alone: clipping per tensor, AdamW and the teacher's moving average, on gradients that are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .console import print_op_rows
from .machine import ceiling
from .methods import LAPTOP, LARGE, METHODS, OFFICIAL, OURS, Method, StepSize, build_official, build_trainer
from .official_step import OfficialStep
from .rows import Row, case_columns, write_rows
from .timing import check_error, measure_calls

FOREACH, COMPILED = "foreach", "compile(foreach)"
TOLERANCE = 1e-6  # relative difference of any parameter of student and teacher after two updates
# Gradients are read for their norm and for the step; parameter and both moments are read and written; so is the teacher.
LEAST_BYTES_PER_PARAMETER = 4 * (2 + 2 * 3 + 2)


def measure_update(
    method: str = "selfpatch",
    large: bool = False,
    out: Path = Path("bench/out/update.csv"),
    threads: int = 2,
    seconds: float = 5.0,
) -> None:
    """Time the update of a whole step against the official one, tensor by tensor, and the library's multi-tensor calls.

    Args:
        method: whose parameters.
        large: those of ViT-S/16, not the laptop's.
        out: the CSV to write.
        threads: CPU threads of all.
        seconds: per provider.
    """
    torch.set_num_threads(threads)
    rows = measure(METHODS[method], LARGE if large else LAPTOP, seconds)
    write_rows(rows, out)
    print_op_rows(rows)
    print(f"rows: {out}")


def measure(method: Method, size: StepSize, seconds: float) -> list[Row]:
    """A row per provider, all on the same gradients and from the same weights."""
    run = method.run(size)
    trainer = build_trainer(run)
    device = trainer.mesh.device.type
    steps = {OFFICIAL: method.official, FOREACH: ForeachUpdate, COMPILED: CompiledUpdate}
    peers = {name: build_official(step, trainer) for name, step in steps.items()}
    branches = {name: (peer.student, peer.teacher) for name, peer in peers.items()}
    branches[OURS] = (trainer.student, trainer.teacher)
    trainer.step_values.write(trainer.clock)
    terms = {"loss": torch.ones((), device=device)}

    updates: dict[str, Callable[[], object]] = {name: peer.update for name, peer in peers.items()}
    updates[OURS] = lambda: trainer.update.step(terms, trainer.step_values.values)
    gradients = make_gradients(trainer.student, run.optim.clip)
    calls = {name: with_gradients(branches[name][0], gradients, update) for name, update in updates.items()}
    for _ in range(2):
        for call in calls.values():
            call()
    errors = {name: largest_difference(branches[name], branches[OFFICIAL]) for name in calls}
    for name, error in errors.items():
        check_error(f"{name}: parameters", error, TOLERANCE)
    parameters = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    moved = parameters * LEAST_BYTES_PER_PARAMETER
    floor_ms = 1e3 * moved / ceiling(device, torch.float32).bandwidth
    case = f"{method.title} {run.model.arch}, {len(gradients)} tensors, {parameters / 1e6:.1f} M"
    shared = case_columns("update", case, "float32", device, "update") | {"status": "ok", "floor_ms": floor_ms}
    measured = measure_calls({name: [call] for name, call in calls.items()}, device, seconds)
    return [
        shared
        | columns
        | {"provider": name, "error": errors[name], "percent_of_floor": 100 * floor_ms / columns["median_ms"]}
        | {"gb_per_s": moved / columns["median_ms"] / 1e6}
        for name, columns in measured.items()
    ]


def make_gradients(student: nn.Module, clip: float) -> dict[str, Tensor]:
    """Random, with half the norm that is clipped: the official update then multiplies nothing, which is in its favor."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(p.shape, generator=generator).to(p.device)
        for name, p in student.named_parameters()
        if p.requires_grad
    }
    return {name: g * (0.5 * clip / g.norm()) for name, g in drawn.items()}


def with_gradients(
    student: nn.Module, gradients: dict[str, Tensor], update: Callable[[], object]
) -> Callable[[], None]:
    """The update, after the student's gradients are set to these."""
    named = dict(student.named_parameters())

    def call() -> None:
        for name, gradient in gradients.items():
            named[name].grad = gradient
        update()

    return call


def largest_difference(branches: tuple, others: tuple) -> float:
    """The largest difference of any two parameters, relative to the largest of its tensor."""
    pairs = [
        (p, dict(other.named_parameters())[name])
        for branch, other in zip(branches, others, strict=True)
        for name, p in branch.named_parameters()
    ]
    return max(((p - q).abs().max() / q.abs().max().clamp(min=1e-3)).item() for p, q in pairs)


class ForeachUpdate(OfficialStep):
    """The library's multi-tensor calls, one after another."""

    @torch.no_grad()
    def update(self) -> None:
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        torch._foreach_mul_(gradients, list((self.run.optim.clip / (norms + 1e-6)).clamp(max=1).unbind()))
        self.optimizer.step()
        teacher, student = zip(*self.pairs, strict=True)
        torch._foreach_lerp_(teacher, student, 1 - self.run.optim.teacher_momentum)


class CompiledUpdate(ForeachUpdate):
    """The same through torch.compile."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.compiled = torch.compile(super().update)

    def update(self) -> None:
        self.compiled()
