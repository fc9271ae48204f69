"""What a run would be and cost: everything is built, two small steps are measured, nothing is written."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..cost import Cost
from ..engine.assembly import build_clock, build_objectives, build_trainer
from ..engine.graph import choose_recorder
from ..engine.metrics import Metrics
from ..engine.parallel import Mesh, choose_compiled
from ..engine.settings_table import settings_table
from ..engine.trainer import Trainer
from ..report.console import print_sentence
from ..run import Run
from ..threads import limit_spinning
from .papers import YOUR_IMAGES

CPU_BATCH = 2  # images of a measured step on a CPU: some batches of a GPU do not fit


@dataclass(frozen=True)
class Measured:
    """A step on this machine."""

    images: int
    seconds: float
    peak_bytes: int | None
    """Of the GPU; None on a CPU."""


def dry_run(run: Run) -> None:
    """Prints the settings and the cost of a run, on the processes that would train it or that it names."""
    if int(os.environ.get("RANK", 0)):
        return
    parallel, started = run.parallel, int(os.environ.get("WORLD_SIZE", 1))
    world = started if started > 1 else (parallel.replicate or 1) * parallel.shard
    stands_in = run.data.path == YOUR_IMAGES
    if stands_in:
        run = replace(run, data=replace(run.data, path="", loader="procedural"))
    objectives = build_objectives(run, world)  # an error if so many processes do not allow them
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The folder is for the list of unreadable images, if a step finds some. Threads wait as they do in the run itself.
    with tempfile.TemporaryDirectory() as nowhere, limit_spinning(print_sentence):
        trainer = build_small(run, Mesh(device), nowhere)
        try:
            clock = build_clock(run, world, trainer.loader.dataset_size)
            measured = measure(trainer)
        finally:
            trainer.loader.close()
    console = Console()
    needs_masks = any(o.needs().masks for o in objectives.objectives())
    choices = trainer.choices | choices_of(run, Mesh(device, world=world), needs_masks)
    console.print(settings_table(run, clock, world, trainer.loader.dataset_size, choices))
    for doubt in run.optim.doubts(run.global_batch(world)):
        print_sentence(doubt, console)
    console.print(cost_table(run, world, clock.total, trainer, measured))
    if stands_in:
        console.print(
            f"No images yet: {run.data.procedural_images} generated ones stand for yours; --data.path FOLDER names them, "
            "--data.procedural-images N says how many they are."
        )
    console.print("Nothing was written: this was a dry run.")


def build_small(run: Run, mesh: Mesh, folder: str) -> Trainer:
    """The trainer of one process, with batches that fit, whose steps are launched."""
    batch = run.data.batch_per_rank if mesh.device.type == "cuda" else min(run.data.batch_per_rank, CPU_BATCH)
    small = replace(
        run,
        data=replace(run.data, batch_per_rank=batch, workers=0),
        parallel=replace(run.parallel, replicate=None, shard=1, accumulate=1, graph="off", compile="off"),
        output=replace(run.output, folder=folder, save_async=False),
    )
    return build_trainer(small, mesh, metrics=Metrics(mesh, None, {}, Cost()))


def choices_of(run: Run, mesh: Mesh, needs_masks: bool) -> dict[str, tuple[str, str]]:
    """What the run itself would choose for its steps on this machine, and why; the measured steps are simpler."""
    recorder, step = choose_recorder(run, mesh, needs_masks)
    compiled, why = choose_compiled(run.parallel, recorder is not None)
    return {"step": step, "branches": ("compiled" if compiled else "not compiled", why)}


def measure(trainer: Trainer) -> Measured:
    """The second of two steps; the first one is slower."""
    device = trainer.mesh.device
    trainer.step()
    wait_for(device)
    began = time.perf_counter()
    trainer.step()
    wait_for(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measured(trainer.global_batch, time.perf_counter() - began, peak)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cost_table(run: Run, world: int, steps: int, trainer: Trainer, measured: Measured) -> Table:
    """Time, memory and disk."""
    device = trainer.mesh.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    rate = measured.images / measured.seconds
    images = run.global_batch(world) * steps
    state = sum(bytes_of(trainer.tensors())) + sum(bytes_of(trainer.update.state_dict()))
    teacher = sum(bytes_of({"teacher": trainer.teacher.backbone.state_dict()}))
    gradients = sum(4 * p.numel() for p in trainer.student.parameters() if p.requires_grad)
    here = f"a launched step of {measured.images} images on {name}"
    table = Table("", "value", "from", title="cost")
    table.add_row("images/s per process", f"{rate:.3g}", here)
    table.add_row(
        "seconds per step", f"{run.global_batch(world) / world / rate:.3g}", "at that rate, without waiting for others"
    )
    table.add_row("the whole run", duration(images / world / rate), f"{steps} steps on {world} processes, at that rate")
    table.add_row(
        "memory: state", gib(state + gradients), "weights, gradients, optimizer; sharded over --parallel.shard"
    )
    if measured.peak_bytes is None:
        table.add_row("memory: activations", "unknown", "measured on a GPU only")
    else:
        table.add_row("memory: peak", gib(measured.peak_bytes), f"of that step, on {name}")
    table.add_row("a checkpoint", gib(state + teacher), f"the latest {run.output.keep} are kept in {run.output.folder}")
    return table


def bytes_of(tensors: Mapping) -> Iterator[int]:
    """The bytes of each tensor in nested dictionaries."""
    for value in tensors.values():
        if isinstance(value, Tensor):
            yield value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            yield from bytes_of(value)


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds < 86400 * 365 else f"{seconds / 86400:.0f} days"
