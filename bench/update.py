"""The update alone: clipping per tensor, AdamW, the teacher's moving average, from gradients that lie there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .machine import ceiling, provenance
from .official_step import OfficialStep
from .ops import show, write
from .step import LAPTOP, LARGE, METHODS, OFFICIAL, OURS, Method, Size, build_official, build_trainer
from .timing import interleaved, peak_extra_bytes

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
        large: ViT-S/16's, not the laptop's.
        out: the CSV to write.
        threads: CPU threads of all.
        seconds: per provider.
    """
    torch.set_num_threads(threads)
    rows = measure(METHODS[method], LARGE if large else LAPTOP, seconds)
    write(rows, out)
    show(rows)
    print(f"rows: {out}")


def measure(method: Method, size: Size, seconds: float) -> list[dict]:
    """A row per provider, all on the same gradients and from the same weights."""
    run = method.run(size)
    trainer = build_trainer(run)
    device = trainer.mesh.device.type
    kinds = {OFFICIAL: method.official, FOREACH: ForeachUpdate, COMPILED: CompiledUpdate}
    peers = {name: build_official(kind, trainer) for name, kind in kinds.items()}
    branches = {name: (peer.student, peer.teacher) for name, peer in peers.items()} | {
        OURS: (trainer.student, trainer.teacher)
    }

    terms = {"loss": torch.ones((), device=device)}

    def ours() -> None:
        refused, _ = trainer.update.step(terms, trainer.lr, run.optim.weight_decay, freeze=False)
        trainer.teacher.follow(trainer.student, run.optim.teacher_momentum, refused)

    updates = {name: peer.update for name, peer in peers.items()} | {OURS: ours}
    gradients = make_gradients(trainer.student, run.optim.clip)
    calls = {name: with_gradients(branches[name][0], gradients, update) for name, update in updates.items()}
    for _ in range(2):
        for call in calls.values():
            call()
    errors = {name: furthest(branches[name], branches[OFFICIAL]) for name in calls}
    for name, error in errors.items():
        if error > TOLERANCE:
            raise SystemExit(f"{name}: parameters differ by {error:.1e}, more than {TOLERANCE:g}: nothing is timed")
    parameters = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    moved = parameters * LEAST_BYTES_PER_PARAMETER
    floor = 1e3 * moved / ceiling(device, torch.float32).bandwidth
    base = {
        "op": "update",
        "case": f"{method.title} {run.model.arch}, {len(gradients)} tensors, {parameters / 1e6:.1f} M",
        "dtype": "float32",
        "device": device,
        "mode": "update",
        "status": "ok",
        "floor_ms": floor,
        **provenance(device).columns(),
    }
    memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
    timings = interleaved({name: [call] for name, call in calls.items()}, device, seconds)
    return [
        base
        | {"provider": name, "median_ms": t.median, "p20_ms": t.p20, "p80_ms": t.p80, "rounds": t.rounds}
        | {"percent_of_floor": 100 * floor / t.median, "gb_per_s": moved / t.median / 1e6, "error": errors[name]}
        | {"peak_extra_mb": "" if memory[name] is None else memory[name] / 1e6}
        for name, t in timings.items()
    ]


def make_gradients(student: torch.nn.Module, clip: float) -> dict[str, Tensor]:
    """Random, of half the limit's norm: an official step then multiplies nothing, which is in its favor."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(p.shape, generator=generator).to(p.device)
        for name, p in student.named_parameters()
        if p.requires_grad
    }
    return {name: g * (0.5 * clip / g.norm()) for name, g in drawn.items()}


def with_gradients(
    student: torch.nn.Module, gradients: dict[str, Tensor], update: Callable[[], None]
) -> Callable[[], None]:
    named = dict(student.named_parameters())

    def call() -> None:
        for name, gradient in gradients.items():
            named[name].grad = gradient
        update()

    return call


def furthest(branches: tuple, others: tuple) -> float:
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
        mine, theirs = zip(*self.pairs, strict=True)
        torch._foreach_lerp_(mine, theirs, 1 - self.run.optim.teacher_momentum)


class CompiledUpdate(ForeachUpdate):
    """The same through torch.compile."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.update = torch.compile(super().update)
