"""The whole training step on synthetic crops: official-math eager against ours, same weights, same crops, one process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from patchlight.data.policy import dino_policy
from patchlight.engine.trainer import Trainer
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.records import Clock, Crops, Views
from patchlight.run import Data, Model, Objectives, Optim, Parallel, Run, Schedule

from .machine import provenance
from .official_step import CENTER_MOMENTUM, CLIP, LAMBDA, TEACHER_TEMPERATURE, OfficialStep
from .ops import show, write
from .timing import interleaved, peak_extra_bytes

TOLERANCE = 1e-4  # relative, between the losses of the two first steps


@dataclass(frozen=True)
class StepSuite:
    """The size of the step. The defaults are a laptop's; `--large` is ViT-S/16 with 2 x 224 + 8 x 96 at batch 64."""

    large: bool = False
    batch: int | None = None
    seconds: float = 20.0


class SyntheticLoader:
    """The same random crops for ever, already on the device."""

    stall_seconds, replaced = 0.0, 0

    def __init__(self, run: Run, device: torch.device) -> None:
        self.dataset_size = run.data.batch_per_rank * 1000
        generator = torch.Generator().manual_seed(0)

        def crops(specs) -> Crops:
            count, size, batch = sum(s.count for s in specs), specs[0].size, run.data.batch_per_rank
            pixels = torch.randn(count, batch, 3, size, size, generator=generator).to(device)
            return Crops(pixels, torch.zeros(count, batch, 4), torch.zeros(count, batch, dtype=torch.bool))

        policy = run.data.crops
        self.views = Views(
            crops(policy.global_crops), crops(policy.local_crops), None, torch.arange(run.data.batch_per_rank)
        )

    def __next__(self) -> Views:
        return self.views

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class Silent:
    """Metrics that keep the last loss only."""

    loss: Tensor

    def add(self, terms: dict[str, Tensor]) -> None:
        self.loss = terms["loss"]

    def log(self, clock: Clock, values: dict[str, float]) -> dict[str, float]:
        return {}


def run_of(suite: StepSuite) -> Run:
    """DINO + SelfPatch with the heads of the release: 65536 (4096 for the small size) and 4096 prototypes."""
    dino = DinoOptions(prototypes=65536 if suite.large else 4096, center_over="all")
    return Run(
        model=Model(
            "vit_small" if suite.large else "vit_tiny",
            image_size=224 if suite.large else 96,
            drop_path=0.0,
            summary="class_attention",
        ),
        objectives=Objectives((dino, SelfPatchOptions()), weights={"selfpatch/patch": LAMBDA}),
        data=Data(
            loader="procedural",
            crops=dino_policy(8, 224, 96) if suite.large else dino_policy(4, 96, 48),
            batch_per_rank=suite.batch or (64 if suite.large else 16),
        ),
        optim=Optim(warmup_epochs=0, clip=CLIP, freeze_prototypes_epochs=0, weight_decay_end=0.04),
        schedule=Schedule(epochs=1),
        parallel=Parallel(precision="bf16" if torch.cuda.is_available() else "fp32"),
    )


def measure_step(
    suite: Annotated[StepSuite, tyro.conf.arg(name="")] = StepSuite(),
    out: Path = Path("bench/out/step.csv"),
    threads: int = 2,
) -> None:
    """Time the whole DINO + SelfPatch step against the official mathematics.

    Args:
        suite: the size.
        out: the CSV to write.
        threads: CPU threads of PyTorch, ours and the official step's.
    """
    torch.set_num_threads(threads)
    run = run_of(suite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = Silent()
    trainer = Trainer(run, loader=SyntheticLoader(run, device), metrics=metrics)
    student, teacher = copy.deepcopy(trainer.student), copy.deepcopy(trainer.teacher)
    official = OfficialStep(student, teacher, k=4, lr=trainer.lr, momentum=run.optim.teacher_momentum)
    views = next(trainer.loader)

    def theirs() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.parallel.precision == "bf16"):
            official.loss_value = official.step(views)

    steps: dict[str, Callable] = {"official eager": theirs, "patchlight": trainer.step}
    for step in steps.values():
        step()
    gap = abs(metrics.loss.item() - official.loss_value) / abs(official.loss_value)
    if gap > TOLERANCE and run.parallel.precision == "fp32":
        raise SystemExit(f"the first losses differ by {gap:.1e}, more than {TOLERANCE:g}: nothing is timed")
    rows = {
        name: {
            "op": "step",
            "case": f"DINO+SelfPatch {run.model.arch}/{run.model.patch_size} B{run.data.batch_per_rank}",
            "dtype": run.parallel.precision,
            "device": device.type,
            "mode": "train",
            "provider": name,
            "status": "ok",
            "error": gap,
            "peak_extra_mb": (peak_extra_bytes(step, device.type) or 0) / 1e6,
            **provenance(device.type).columns(),
        }
        for name, step in steps.items()
    }
    timings = interleaved({name: [functools.partial(step)] for name, step in steps.items()}, device.type, suite.seconds)
    for name, timing in timings.items():
        rows[name] |= {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80, "rounds": timing.rounds}
    write(list(rows.values()), out)
    show(list(rows.values()))
    print(f"{run.data.batch_per_rank / timings['patchlight'].median * 1e3:.1f} images/s; rows: {out}")


assert (DinoOptions().center_momentum, DinoOptions().teacher_temperature) == (CENTER_MOMENTUM, TEACHER_TEMPERATURE)
