"""A run that takes a second: a small ViT on noise, and helpers to start it on several processes."""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patchlight.data.policy import dino_policy, pqcl_policy
from patchlight.engine.assembly import build_trainer
from patchlight.engine.graph import Recorder
from patchlight.engine.parallel import Mesh, processes
from patchlight.engine.trainer import Trainer
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.ibot import IbotOptions
from patchlight.objectives.moby import MobyOptions
from patchlight.objectives.moco_v3 import MocoV3Options
from patchlight.objectives.pqcl import PqclOptions
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.objectives.sere import SereOptions
from patchlight.records import Clock, Crops, Views
from patchlight.run import Data, Model, Objectives, Optim, Output, Parallel, Run, Schedule
from patchlight_kernels import force

HEAD = {"prototypes": 37, "bottleneck": 11, "hidden": 24, "train_norm": True, "student_temperature": 0.5}
DINO = DinoOptions(**HEAD, teacher_temperature=0.4)
IBOT = IbotOptions(**HEAD, teacher_temperature=0.4, warmup_epochs=0, patch_teacher_temperature=0.4)
MOCO = MocoV3Options(hidden=16, out=8)
MOBY = MobyOptions(queue=32, hidden=16, out=8)
SELFPATCH = SelfPatchOptions(**HEAD, teacher_temperature=0.4)
PQCL = PqclOptions(student_temperature=0.5, teacher_temperature=0.4, warmup_epochs=0)
SERE = SereOptions(global_points=5, local_points=3)
# What tests of whole steps run: every method, alone or with its host.
COMBINATIONS = {
    "dino": (DINO,),
    "dino+selfpatch": (DINO, SELFPATCH),
    "dino+sere": (DINO, SERE),
    "ibot": (IBOT,),
    "ibot+pqcl": (IBOT, PQCL),
    "ibot+sere": (IBOT, SERE),
    "moco+moby": (MOCO, MOBY),
}


def tiny_run(folder: Path | str, **parts) -> Run:
    """8 images per step, two crop sizes; a low learning rate, so that rounding is not amplified."""
    options = parts.pop("options", (DINO,))
    has_queries = any(isinstance(part, PqclOptions) for part in options)
    of_parts = {
        "model": {
            "image_size": 16,
            "patch_size": 4,
            "drop_path": 0.0,
            "sizes": {"width": 20, "depth": 2, "heads": 2},
            "summary": "class_attention" if SELFPATCH in options else "cls",
            "positions": "sincos" if has_queries else "learned",
        },
        "data": {
            "loader": "procedural",
            "crops": pqcl_policy(2, 12, global_size=16) if has_queries else dino_policy(2, 16, 12),
            "batch_per_rank": 8,
            "workers": 0,
        },
        "optim": {"base_lr": 1e-3 * 32, "warmup_epochs": 1, "teacher_momentum": 0.9},
        "schedule": {"epochs": 4, "steps_per_epoch": 5},
        "parallel": {"precision": "fp32"},
        "output": {"folder": str(folder), "save_every": 10**6, "log_every": 5},
        "objectives": {"options": options},
    }
    kinds = {
        "model": Model,
        "data": Data,
        "optim": Optim,
        "schedule": Schedule,
        "parallel": Parallel,
        "output": Output,
        "objectives": Objectives,
    }
    return Run(**{name: kind(**{**of_parts[name], **parts.get(name, {})}) for name, kind in kinds.items()})


class NoiseLoader:
    """Batches that depend on the samples' running numbers only, so they are the same for any split over ranks and batches."""

    dataset_size = 10**6
    stall_seconds, replaced = 0.125, 0

    def __init__(self, run: Run, mesh: Mesh | None = None) -> None:
        self.batch, self.crops = run.data.batch_per_rank, run.data.crops
        self.rank, self.world = (mesh.rank, mesh.world) if mesh else (0, 1)
        self.samples = 0

    def __next__(self) -> Views:
        first = self.samples + self.rank * self.batch
        self.samples += self.batch * self.world
        ids = torch.arange(first, first + self.batch)
        kinds = {kind: self.cut(ids, specs) for kind, specs in self.crops.kinds()}
        return Views(kinds["global_crops"], kinds.get("local_crops"), kinds.get("query_crops"), ids)

    def cut(self, ids: Tensor, specs: tuple) -> Crops:
        count, size = sum(spec.count for spec in specs), specs[0].size
        generators = [torch.Generator().manual_seed(int(i)) for i in ids]
        images = [torch.randn(count, 3, size, size, generator=generator) for generator in generators]
        corners = torch.stack([torch.rand(count, 5, generator=generator) for generator in generators], dim=1)
        box = torch.cat([corners[..., :2] * 40, 20 + corners[..., 2:4] * 30], dim=-1).round()
        return Crops(torch.stack(images, dim=1), box, corners[..., 4] < 0.5)

    def state_dict(self) -> dict:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict) -> None:
        self.samples = state["samples"]


class Prepared:
    """Batches made beforehand."""

    stall_seconds, replaced = 0.0, 0

    def __init__(self, loader: NoiseLoader, batches: int) -> None:
        self.views = [next(loader) for _ in range(batches)]

    def __next__(self) -> Views:
        return self.views.pop(0)

    def state_dict(self) -> dict:
        return {}


class MetricsInMemory:
    """Metrics kept in memory: every step's numbers, every log line, every diagnosis."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.lines: list[dict[str, float]] = []
        self.diagnoses: list[str] = []
        self.looks: list[tuple[int, dict[str, float], dict[str, bytes]]] = []
        self.closed = False

    def add(self, terms: dict[str, Tensor]) -> None:
        self.steps.append({name: term.detach().clone() for name, term in terms.items()})

    def log(self, clock: Clock, values: dict[str, float]) -> dict[str, float]:
        self.lines.append({name: float(term) for name, term in self.steps[-1].items()} | values)
        return self.lines[-1]

    def look(self, clock: Clock, accuracies: dict[str, float], pictures: dict[str, bytes]) -> None:
        self.looks.append((clock.step, accuracies, pictures))

    def diagnose(self, clock: Clock, diagnosis) -> None:
        self.diagnoses.append(diagnosis.name)

    def close(self) -> None:
        self.closed = True


def tiny_trainer(
    run: Run, mesh: Mesh | None = None, metrics: MetricsInMemory | None = None, recorder: Recorder | None = None
) -> Trainer:
    """recorder: of the step, in place of the one that the run chooses."""
    trainer = build_trainer(run, mesh, NoiseLoader(run, mesh), metrics or MetricsInMemory())
    trainer.repeated_step.recorder = recorder or trainer.repeated_step.recorder
    return trainer


def assert_a_resumed_run_is_the_whole(folder: Path, steps: int, **parts: Any) -> None:
    """A run that stops after so many steps and is resumed ends bit for bit as one that does not stop."""
    whole = train_tiny(tiny_run(folder / "whole", **parts))
    run = tiny_run(folder / "parts", **parts)
    first = tiny_trainer(run)
    for _ in range(steps):
        first.step()
    first.save()
    first.checkpoints.finish()
    torch.manual_seed(12345)
    second = train_tiny(replace(run, output=replace(run.output, resume=True)))
    assert [step["loss"] for step in second["terms"]] == [step["loss"] for step in whole["terms"][steps:]]
    for part in ("student", "teacher", "objectives"):
        assert largest_difference(whole[part], second[part]) == 0


def step_values(lr: float, weight_decay: float = 0.1, momentum: float = 0.9, freeze: bool = False) -> dict[str, Tensor]:
    """The numbers of a step for `Update.step`."""
    numbers = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "freeze_prototypes": float(freeze)}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def on_processes(count: int, work: Callable, *arguments, timeout: float = 600) -> list:
    """Runs work(*arguments) on `count` processes, started as torchrun does; returns their results by rank.

    They connect to a store of this process, as to torchrun's: its port is in use from the start, so no other program can
    take it before they connect.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["patchlight.engine.trainer"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, rank, count, store.port, work, arguments))
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        results = [receive(receiver, timeout) for _, receiver in started]
        for process, _ in started:
            process.join(timeout)
        codes = [process.exitcode for process, _ in started]
        assert codes == [0] * count, f"exit codes {codes}"
        return results
    finally:
        for process, _ in started:
            process.kill()


def receive(receiver: multiprocessing.connection.Connection, timeout: float) -> object:
    """The result of a process; None if it ended without one."""
    assert receiver.poll(timeout), "a process neither returned nor ended"
    try:
        return receiver.recv()
    except EOFError:
        return None


def _child(sender, rank: int, count: int, port: int, work: Callable, arguments: tuple) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torchrun |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in torchrun.items()})
    sender.send(work(*arguments))


def train_tiny(run: Run, steps: int | None = None, whole: bool = True) -> dict:
    """Trains and returns plain values: the terms of every step, and the final weights of both branches."""
    # Not the interpreted Triton kernel, which takes a second.
    with force(neighbor_topk="reference"), processes(run.parallel) as mesh:
        trainer = tiny_trainer(run, mesh)
        if steps is None:
            trainer.fit()
        else:
            for _ in range(steps):
                trainer.step()
        return outcome(trainer)


def outcome(trainer: Trainer) -> dict:
    """Terms per step, averaged over ranks; weights and optimizer state, put together."""
    rows = [torch.stack([term.double() for term in step.values()]) for step in trainer.metrics.steps]
    means = [trainer.mesh.mean_over_all(row) for row in rows]
    names = list(trainer.metrics.steps[0]) if rows else []
    return {
        "terms": [dict(zip(names, row.tolist(), strict=True)) for row in means],
        "student": whole(trainer.student.state_dict()),
        "teacher": whole(trainer.teacher.state_dict()),
        "objectives": whole(trainer.objectives.state_dict()),
        "clock": trainer.clock,
    }


def whole(tensors: dict[str, Tensor]) -> dict:
    """As numpy arrays, which can be sent between processes without shared memory."""
    full = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    return {name: t.detach().clone().numpy() for name, t in full.items()}


def largest_difference(a: dict, b: dict) -> float:
    """The largest difference of two dictionaries of arrays with equal keys."""
    assert a.keys() == b.keys()
    return max(float(abs(a[name].astype("float64") - b[name].astype("float64")).max()) for name in a)
