"""The whole training step on synthetic crops: official-math eager against ours, same weights, same crops, one process.

A method that rides on a host is also compared with its host alone, trained by us: how much longer a step takes against
how many more FLOPs it asks for (the rule: bench/flops.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from patchlight.data.policy import CropPolicy, dino_policy, pqcl_policy, sample_crops
from patchlight.engine.trainer import Trainer
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.ibot import IbotOptions
from patchlight.objectives.pqcl import PqclOptions
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.objectives.sere import SereOptions, sere_weights
from patchlight.recipes.papers import HALF_MASKED, LAMBDA
from patchlight.records import Clock, Crops, Views
from patchlight.run import Data, Model, Objectives, Optim, Options, Parallel, Run, Schedule

from .flops import flops_of
from .machine import PROVENANCE, provenance
from .official_step import (
    OfficialDino,
    OfficialDinoSere,
    OfficialIbot,
    OfficialIbotSere,
    OfficialPqcl,
    OfficialSelfPatch,
    OfficialStep,
)
from .ops import TIMED, write
from .timing import interleaved, peak_extra_bytes

TOLERANCE = 1e-4  # relative, between the losses of the two first steps
IMAGE = (500, 375)  # width and height of the images that crops are cut from
OFFICIAL, OURS, HOST, RATIO = "official eager", "patchlight", "host alone", "over host"
COLUMNS = (*TIMED, "images_per_s", "gflop", "peak_extra_mb", "error", "time_ratio", "flop_ratio", *PROVENANCE)


@dataclass(frozen=True)
class Size:
    """What a step is made of, whatever the method."""

    arch: str
    batch: int
    image: int  # side of the global crops
    small: int  # side of local and query crops
    local_crops: int
    dino_prototypes: int
    prototypes: int  # of iBOT and of patches
    points: tuple[int, int]  # per side, of SERE's global and local pairs
    sizes: dict[str, int] = field(default_factory=dict)  # as `Model.sizes`


LAPTOP = Size("vit_tiny", 16, 96, 48, 4, 4096, 4096, (6, 3))
LARGE = Size("vit_small", 64, 224, 96, 8, 65536, 8192, (13, 6))


def dino(size: Size) -> Run:
    return run_of(size, DinoOptions(prototypes=size.dino_prototypes))


def selfpatch(size: Size) -> Run:
    """With the release's readings: the teacher sees local crops, and both centers are over all of them."""
    options = DinoOptions(prototypes=size.dino_prototypes, center_over="all"), SelfPatchOptions()
    return run_of(size, *options, weights=LAMBDA, summary="class_attention")


def ibot(size: Size) -> Run:
    return run_of(size, IbotOptions(prototypes=size.prototypes))


def ibot_sere(size: Size) -> Run:
    weights = sere_weights({"ibot/cls": 1.0, "ibot/patch": 1.0}, alpha=0.2, beta=0.5)
    return run_of(size, IbotOptions(prototypes=size.prototypes), sere_options(size), weights=weights)


def dino_sere(size: Size) -> Run:
    weights = sere_weights({"dino/cls": 1.0}, alpha=1.0, beta=1.0)
    return run_of(size, DinoOptions(prototypes=size.dino_prototypes), sere_options(size), weights=weights)


def sere_options(size: Size) -> SereOptions:
    return SereOptions(global_points=size.points[0], local_points=size.points[1])


def pqcl(size: Size) -> Run:
    """As released, positions ignore mirrors."""
    options = IbotOptions(prototypes=size.prototypes), PqclOptions(flip_aware=False)
    policy = pqcl_policy(query_size=size.small, global_size=size.image)
    return run_of(size, *options, crops=policy, positions="sincos")


def ibot_without_locals(size: Size) -> Run:
    """PQCL's host: the same two global crops."""
    policy = replace(pqcl_policy(global_size=size.image), query_crops=())
    return run_of(size, IbotOptions(prototypes=size.prototypes), crops=policy, positions="sincos")


@dataclass(frozen=True)
class Method:
    """What is timed against what."""

    title: str
    run: Callable[[Size], Run]
    official: type[OfficialStep]
    host: Callable[[Size], Run] | None = None


METHODS = {
    "dino": Method("DINO", dino, OfficialDino),
    "selfpatch": Method("DINO+SelfPatch", selfpatch, OfficialSelfPatch, host=dino),
    "ibot": Method("iBOT", ibot, OfficialIbot),
    "sere": Method("iBOT+SERE", ibot_sere, OfficialIbotSere, host=ibot),
    "dino-sere": Method("DINO+SERE", dino_sere, OfficialDinoSere, host=dino),
    "pqcl": Method("iBOT+PQCL", pqcl, OfficialPqcl, host=ibot_without_locals),
}


def run_of(
    size: Size,
    *options: Options,
    weights: dict[str, float] | None = None,
    crops: CropPolicy | None = None,
    **model: str,
) -> Run:
    return Run(
        model=Model(size.arch, image_size=size.image, drop_path=0.0, sizes=size.sizes, **model),
        objectives=Objectives(options, weights or {}, masks=HALF_MASKED),
        data=Data(
            loader="procedural",
            crops=crops or dino_policy(size.local_crops, size.image, size.small),
            batch_per_rank=size.batch,
        ),
        optim=Optim(warmup_epochs=0, freeze_prototypes_epochs=0, weight_decay_end=0.04),
        schedule=Schedule(epochs=1),
        parallel=Parallel(precision="bf16" if torch.cuda.is_available() else "fp32"),
    )


class SyntheticLoader:
    """The same random crops for ever, already on the device; their boxes are drawn as the policy says."""

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

        self.views = Views(*map(crops, ("global_crops", "local_crops", "query_crops")), torch.arange(batch))

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


def build_trainer(run: Run) -> Trainer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trainer(run, loader=SyntheticLoader(run, device), metrics=Silent())


def build_official(kind: type[OfficialStep], trainer: Trainer) -> OfficialStep:
    """On copies of the trainer's branches, before these move."""
    student, teacher, views = copy.deepcopy(trainer.student), copy.deepcopy(trainer.teacher), next(trainer.loader)
    return kind(student, teacher, trainer.run, trainer.lr, views, next_mask(trainer))


def next_mask(trainer: Trainer) -> Tensor | None:
    """What the trainer's next step will hide."""
    if trainer.objectives.masking is None:
        return None
    pixels = next(trainer.loader).global_crops.pixels
    grid = trainer.student.backbone.grid(*pixels.shape[-2:])
    return trainer.objectives.masking.masks(trainer.clock.images_seen, *pixels.shape[:2], grid, pixels.device)


@dataclass(frozen=True)
class StepSuite:
    """The size of the step. The defaults are a laptop's; `--large` is ViT-S/16 with 2 x 224 + 8 x 96 at batch 64."""

    method: Literal["dino", "selfpatch", "ibot", "sere", "dino-sere", "pqcl"] | None = None
    """One method; all of them, in turn, if left out."""
    large: bool = False
    batch: int | None = None
    seconds: float = 6.0
    """For each of the steps that are compared, and no fewer than 10 rounds."""


def measure_step(
    suite: Annotated[StepSuite, tyro.conf.arg(name="")] = StepSuite(),
    out: Path = Path("bench/out/step.csv"),
    threads: int = 2,
) -> None:
    """Time whole training steps against the official mathematics, and plug-ins against their hosts alone.

    Args:
        suite: what to measure.
        out: the CSV to write.
        threads: CPU threads of PyTorch, ours and the official step's.
    """
    torch.set_num_threads(threads)
    size = LARGE if suite.large else LAPTOP
    size = replace(size, batch=suite.batch or size.batch)
    rows: list[dict] = []
    for name in [suite.method] if suite.method else METHODS:
        found = measure(METHODS[name], size, suite.seconds)
        show(found)
        rows += found
        write(rows, out, COLUMNS)
    print(f"rows: {out}")


def measure(method: Method, size: Size, seconds: float) -> list[dict]:
    """The rows of one method: correctness first, then FLOPs and memory, then all steps by turns."""
    run = method.run(size)
    trainer = build_trainer(run)
    official = build_official(method.official, trainer)
    views, device = next(trainer.loader), trainer.mesh.device.type

    def theirs() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=run.parallel.precision == "bf16"):
            official.last_loss = official.step(views)

    steps: dict[str, Callable[[], None]] = {OFFICIAL: theirs, OURS: trainer.step}
    for step in steps.values():
        step()
    gap = abs(trainer.metrics.loss.item() - official.last_loss) / abs(official.last_loss)
    if gap > TOLERANCE and run.parallel.precision == "fp32":
        raise SystemExit(
            f"{method.title}: the first losses differ by {gap:.1e}, more than {TOLERANCE:g}: nothing is timed"
        )
    if method.host is not None:
        steps[HOST] = build_trainer(method.host(size)).step
    base = {
        "op": "step",
        "case": f"{method.title} {run.model.arch}/{run.model.patch_size} B{size.batch}",
        "dtype": run.parallel.precision,
        "device": device,
        "mode": "train",
        **provenance(device).columns(),
    }
    rows = {name: base | {"provider": name, "status": "ok", "gflop": flops_of(steps[name]) / 1e9} for name in steps}
    for name in (OFFICIAL, OURS):
        rows[name]["error"] = gap
    for name, step in steps.items():
        extra = peak_extra_bytes(step, device)
        rows[name]["peak_extra_mb"] = "" if extra is None else extra / 1e6
    for name, timing in interleaved({name: [step] for name, step in steps.items()}, device, seconds).items():
        rows[name] |= {
            "median_ms": timing.median,
            "p20_ms": timing.p20,
            "p80_ms": timing.p80,
            "rounds": timing.rounds,
            "images_per_s": size.batch / timing.median * 1e3,
        }
    if HOST in rows:
        ratios = {f"{short}_ratio": rows[OURS][key] / rows[HOST][key] for short, key in RATIOS.items()}
        rows[RATIO] = base | {"provider": RATIO, "status": "ratio"} | ratios
    return list(rows.values())


RATIOS = {"time": "median_ms", "flop": "gflop"}


def show(rows: list[dict]) -> None:
    """Time, ratio to the official mathematics, throughput, FLOPs and memory; then what the plug-in adds to its host."""
    first = rows[0]
    title = f"{first['case']} {first['dtype']} on {first['hardware']}, {first['threads']} threads"
    columns = ("median ms", "p20 - p80", f"vs {OFFICIAL}", "images/s", "GFLOP", "peak extra MB", "loss gap")
    table = Table("provider", *columns, title=title)
    for row in rows:
        if row["status"] == "ratio":
            time, flops = row["time_ratio"], row["flop_ratio"]
            table.caption = (
                f"over its host alone: time {time:.2f}x, FLOPs {flops:.2f}x, time per FLOP {time / flops:.2f}x"
            )
            continue
        memory = row["peak_extra_mb"]
        table.add_row(
            row["provider"], f"{row['median_ms']:.4g}", f"{row['p20_ms']:.4g} - {row['p80_ms']:.4g}",
            f"{first['median_ms'] / row['median_ms']:.2f}x", f"{row['images_per_s']:.1f}", f"{row['gflop']:.1f}",
            "" if memory == "" else f"{memory:.0f}", f"{row['error']:.1e}" if "error" in row else "",
        )  # fmt: skip
    Console(width=max(120, Console().width)).print(table)
