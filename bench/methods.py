"""The methods whose training steps are measured: their runs at two sizes, and how their trainers are built."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from patchlight.data.interface import Loader
from patchlight.data.policy import CropPolicy, dino_policy, pqcl_policy, sample_crops
from patchlight.engine import assembly
from patchlight.engine.metrics import Metrics
from patchlight.engine.sentinels import Diagnosis
from patchlight.engine.trainer import Trainer
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.ibot import IbotOptions
from patchlight.objectives.interface import ObjectiveOptions
from patchlight.objectives.pqcl import PqclOptions
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.objectives.sere import SereOptions, sere_weights
from patchlight.recipes.papers import HALF_MASKED, LAMBDA
from patchlight.records import Clock, Crops, Views, now_at
from patchlight.run import Data, Model, Objectives, Optim, Parallel, Run, Schedule

from .official_layers import vit_of
from .official_step import (
    OfficialDino,
    OfficialDinoSere,
    OfficialIbot,
    OfficialIbotSere,
    OfficialPqcl,
    OfficialSelfPatch,
    OfficialStep,
)

OFFICIAL, OURS = "official eager", "patchlight"  # the two providers that every suite over methods has
IMAGE = (500, 375)  # width and height of the images that crops are cut from


@dataclass(frozen=True)
class StepSize:
    """How large a step is, whatever the method."""

    arch: str
    batch: int
    global_size: int  # side of global crops
    local_size: int  # side of local and query crops
    local_crops: int
    dino_prototypes: int
    prototypes: int  # of iBOT and of patches
    points: tuple[int, int]  # per side, of SERE's global and local pairs
    model_sizes: dict[str, int] = field(default_factory=dict)  # as `Model.sizes`
    drop_path: float = 0.0


LAPTOP = StepSize("vit_tiny", 16, 96, 48, 4, 4096, 4096, (6, 3))
LARGE = StepSize("vit_small", 64, 224, 96, 8, 65536, 8192, (13, 6))


def dino(size: StepSize) -> Run:
    return build_run(size, DinoOptions(prototypes=size.dino_prototypes))


def selfpatch(size: StepSize) -> Run:
    """As released: the teacher gets local crops too, and both centers are over all of them."""
    options = DinoOptions(prototypes=size.dino_prototypes, center_over="all"), SelfPatchOptions()
    return build_run(size, *options, weights=LAMBDA, summary="class_attention")


def ibot(size: StepSize) -> Run:
    return build_run(size, IbotOptions(prototypes=size.prototypes))


def ibot_sere(size: StepSize) -> Run:
    weights = sere_weights({"ibot/cls": 1.0, "ibot/patch": 1.0}, alpha=0.2, beta=0.5)
    return build_run(size, IbotOptions(prototypes=size.prototypes), sere_options(size), weights=weights)


def dino_sere(size: StepSize) -> Run:
    weights = sere_weights({"dino/cls": 1.0}, alpha=1.0, beta=1.0)
    return build_run(size, DinoOptions(prototypes=size.dino_prototypes), sere_options(size), weights=weights)


def sere_options(size: StepSize) -> SereOptions:
    return SereOptions(global_points=size.points[0], local_points=size.points[1])


def pqcl(size: StepSize) -> Run:
    """As released, positions ignore mirrors."""
    options = IbotOptions(prototypes=size.prototypes), PqclOptions(flip_aware=False)
    policy = pqcl_policy(query_size=size.local_size, global_size=size.global_size)
    return build_run(size, *options, crops=policy, positions="sincos")


def ibot_without_locals(size: StepSize) -> Run:
    """PQCL's host: the same two global crops."""
    policy = replace(pqcl_policy(global_size=size.global_size), query_crops=())
    return build_run(size, IbotOptions(prototypes=size.prototypes), crops=policy, positions="sincos")


@dataclass(frozen=True)
class Method:
    """A method, its official step, and the host that it extends, if it does."""

    title: str
    run: Callable[[StepSize], Run]
    official: type[OfficialStep]
    host: Callable[[StepSize], Run] | None = None


METHODS = {
    "dino": Method("DINO", dino, OfficialDino),
    "selfpatch": Method("DINO+SelfPatch", selfpatch, OfficialSelfPatch, host=dino),
    "ibot": Method("iBOT", ibot, OfficialIbot),
    "sere": Method("iBOT+SERE", ibot_sere, OfficialIbotSere, host=ibot),
    "dino-sere": Method("DINO+SERE", dino_sere, OfficialDinoSere, host=dino),
    "pqcl": Method("iBOT+PQCL", pqcl, OfficialPqcl, host=ibot_without_locals),
}


def build_run(
    size: StepSize,
    *options: ObjectiveOptions,
    weights: dict[str, float] | None = None,
    crops: CropPolicy | None = None,
    summary: str = "cls",
    positions: str = "learned",
) -> Run:
    return Run(
        model=Model(
            size.arch,
            image_size=size.global_size,
            drop_path=size.drop_path,
            summary=summary,
            positions=positions,
            sizes=size.model_sizes,
        ),
        objectives=Objectives(options, weights or {}, masks=HALF_MASKED),
        data=Data(
            loader="procedural",
            crops=crops or dino_policy(size.local_crops, size.global_size, size.local_size),
            batch_per_rank=size.batch,
        ),
        optim=Optim(warmup_epochs=0, freeze_prototypes_epochs=0, weight_decay_end=0.04),
        schedule=Schedule(epochs=1),
        parallel=Parallel(precision="bf16" if torch.cuda.is_available() else "fp32"),
    )


class SyntheticLoader:
    """The same random crops in every step, already on the device; their boxes are drawn by the policy."""

    stall_seconds, replaced = 0.0, 0

    def __init__(self, run: Run, device: torch.device) -> None:
        batch = run.data.batch_per_rank
        self.dataset_size = batch * 1000
        generator = torch.Generator().manual_seed(0)
        tables = sample_crops(run.data.crops, 0, 0, np.arange(batch), np.tile(IMAGE, (batch, 1)))

        def crops(kind: str) -> Crops | None:
            if kind not in tables:
                return None
            box, flip = torch.from_numpy(tables[kind].box).float(), torch.from_numpy(tables[kind].flip)
            pixels = torch.randn(*flip.shape, 3, tables[kind].size, tables[kind].size, generator=generator)
            return Crops(pixels.to(device), box.to(device), flip.to(device))

        global_crops = crops("global_crops")
        assert global_crops is not None
        self.views = Views(global_crops, crops("local_crops"), crops("query_crops"), torch.arange(batch))

    def __next__(self) -> Views:
        return self.views

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class LastLoss(Metrics):
    """Metrics that keep the last loss only."""

    loss: Tensor

    def __init__(self) -> None:
        pass

    def add(self, terms: Mapping[str, Tensor]) -> None:
        self.loss = terms["loss"]

    def log(self, clock: Clock, values: Mapping[str, float]) -> dict[str, float]:
        return {}

    def diagnose(self, clock: Clock, diagnosis: Diagnosis) -> None:
        pass

    def close(self) -> None:
        pass


def build_trainer(run: Run) -> Trainer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return assembly.build_trainer(run, loader=cast("Loader", SyntheticLoader(run, device)), metrics=LastLoss())


def last_loss(trainer: Trainer) -> float:
    assert isinstance(trainer.metrics, LastLoss)
    return trainer.metrics.loss.item()


def build_official(kind: type[OfficialStep], trainer: Trainer) -> OfficialStep:
    """On copies of the trainer's branches, before the trainer changes these."""
    student, teacher, views = copy.deepcopy(trainer.student), copy.deepcopy(trainer.teacher), next(trainer.loader)
    return kind(
        student, teacher, trainer.run, trainer.step_values.schedule(trainer.clock)["lr"], views, next_mask(trainer)
    )


def next_mask(trainer: Trainer) -> Tensor | None:
    """Which patches the trainer's next step will mask."""
    views = next(trainer.loader)
    pixels = views.global_crops.pixels
    grid = vit_of(trainer.student).grid(*pixels.shape[-2:])
    clock = trainer.clock.at_batch(0, 0, 1, pixels.shape[1])
    now = now_at(clock, trainer.step_values.schedule(clock), pixels.device)
    return trainer.objectives.cue(views, grid, now).mask
