"""Builds everything that trains a `Run`: from top to bottom, the caller first. Nothing here computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..backbones.architectures import build_backbone, capabilities_of
from ..backbones.interface import Backbone
from ..backbones.timm_line import timm_line
from ..checkpoint.folder import TEACHER
from ..checks import check, sentence
from ..cost import cost_of
from ..data import loaders
from ..data.interface import Loader, SourceLoader
from ..data.masking import FixedMasks, ReleasedMasks
from ..data.procedural import ProceduralSource
from ..data.reading import REPORT_FILE as BAD_FILES
from ..data.sources import OwnImages, open_images, open_own
from ..data.stored import Source
from ..data.streams import ImageStream
from ..objectives.interface import BuildContext, Objective
from ..objectives.weighted import WeightedObjectives
from ..records import Clock
from ..report.console import Display
from ..report.entry import trackers_of
from ..report.journal import Journal
from ..report.run_folder import REPORT_FILE
from ..run import PASSED, Model, Run
from ..threads import limit_spinning
from .branches import Student, Teacher, build_branches_on, check_teacher_student
from .checkpoint import Checkpoints
from .device_step import DeviceStep
from .graph import choose_recorder
from .init_from import init_from
from .metrics import Metrics
from .optim import Update
from .pairing import check_pairing
from .parallel import Mesh, choose_compiled, compile_objectives, parallelize, processes
from .precision import DTYPES, build_scaler, choose_precision
from .probe import TeacherProbe
from .schedules import rates_at
from .step_values import StepValues
from .trainer import Trainer


def train(run: Run, source: OwnImages | None = None) -> None:
    """Trains on the processes that torchrun started, or on this process alone, and evaluates the teacher at intervals.

    source: a data set of your own, in place of Data.path: anything with `__len__` and `__getitem__`, or an iterable
    (docs/data.md). A run that is resumed needs it again.
    """
    with processes(run.parallel) as mesh:
        trainer = build_trainer(run, mesh, source=source)
        if source is not None and run.data.path not in ("", trainer.run.data.path):
            trainer.say(
                f"note: the images come from the {type(source).__name__} that was passed, not from {run.data.path}"
            )
        add_probe(trainer)
        for doubt in run.optim.doubts(trainer.global_batch):
            trainer.say(f"note: {doubt}")
        try:
            with limit_spinning(trainer.say):
                trainer.fit()
        finally:
            trainer.loader.close()
        teacher, path = trainer.teacher.backbone, trainer.checkpoints.all()[-1] / TEACHER
        shapes = {name: tuple(tensor.shape) for name, tensor in teacher.state_dict().items()}
        trainer.say(f"Report: {trainer.folder / REPORT_FILE}. The teacher in timm:")
        trainer.say(timm_line(shapes, teacher.heads, run.model.image_size, path))


def add_probe(trainer: Trainer) -> None:
    """Lets the teacher be evaluated at intervals, where the run wants it and its images allow it."""
    if trainer.run.output.evaluate_every == 0:
        return
    without = "so the teacher's k-NN accuracy is not computed during the run"
    if not isinstance(trainer.loader, SourceLoader):
        trainer.say(
            f"note: the images of an iterable have neither numbers nor classes, {without}, and no pictures are drawn."
        )
        return
    if trainer.loader.source.labels is None:
        trainer.say(f"note: the images have no classes, {without}; pictures are drawn.")
    trainer.probe = TeacherProbe(trainer.run, trainer.loader.source, trainer.mesh)


def build_trainer(
    run: Run,
    mesh: Mesh | None = None,
    loader: Loader | None = None,
    metrics: Metrics | None = None,
    source: OwnImages | None = None,
) -> Trainer:
    """The trainer of a run; without a mesh, for one process. Tests pass a loader or metrics that replace the run's.

    source: a data set of the user's own, in place of Data.path.
    """
    mesh = mesh or Mesh(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    precision, precision_reason = choose_precision(run.parallel.precision, mesh.device)
    run = replace(run, parallel=replace(run.parallel, precision=precision))
    loader_reason = ""
    if loader is None:
        run, loader_reason = with_loader(run, mesh.device, source)
    torch.manual_seed(run.parallel.seed)  # the same weights on every rank, each of which then keeps its shard
    objectives = build_objectives(run, mesh.world).to(mesh.device)
    student, teacher = build_branches(run.model, objectives.objectives())
    if run.model.init_from:
        loaded = init_from(student, Path(run.model.init_from))
        teacher.start_from(student)
        if mesh.rank == 0:
            Console().print(loaded.table())
    recorder, step_reason = choose_recorder(run, mesh, any(o.needs().masks for o in objectives.objectives()))
    compiled, compile_reason = choose_compiled(run.parallel, recorder is not None)
    parallelize(student, run.parallel, mesh, trained=True, compiled=compiled)
    parallelize(teacher, run.parallel, mesh, trained=False, compiled=compiled)
    check_teacher_student(teacher, student)
    torch.manual_seed(run.parallel.seed + 1 + mesh.rank)  # dropped paths differ between ranks
    scaler = build_scaler(run.parallel.precision, mesh.device)
    update = Update(student, teacher, run.optim, mesh, scaler)
    dtype = DTYPES[run.parallel.precision]
    if mesh.device.type == "cuda" and dtype is not None and run.optim.name == "adamw" and run.parallel.shard == 1:
        update.keep_copies(dtype)
    if compiled:
        compile_objectives(objectives, student, run.parallel, mesh)
        update.compile()
    loader = loader or build_loader(run, mesh, source)
    clock = build_clock(run, mesh.world, loader.dataset_size)
    values = build_step_values(run, mesh, objectives, clock)
    return Trainer(
        run,
        mesh,
        DeviceStep(run, mesh, student, teacher, objectives, update, scaler, values),
        loader,
        metrics or build_metrics(run, mesh, objectives),
        Checkpoints(Path(run.output.folder) / "checkpoints", mesh, run.output.keep, run.output.save_async),
        clock,
        recorder,
        {
            "loader": (run.data.loader, loader_reason),
            "precision": (precision, precision_reason),
            "step": step_reason,
            "branches": ("compiled" if compiled else "not compiled", compile_reason),
        },
    )


def build_objectives(run: Run, world: int = 1) -> WeightedObjectives:
    """The objectives of a run on so many processes, checked against its model and data."""
    context = build_context(run)
    objectives = [options.build(context) for options in run.objectives.options]
    check_pairing(run, objectives, world)
    return WeightedObjectives(objectives, run.objectives.weights)


def build_context(run: Run) -> BuildContext:
    """The parts of a run that its objectives may depend on."""
    masks = FixedMasks if run.objectives.mask_counts == "fixed" else ReleasedMasks
    model = run.model
    with torch.device("meta"):  # for its sizes only
        backbone = build_backbone(model.arch, patch_size=model.patch_size, image_size=model.image_size, **model.sizes)
    return BuildContext(
        options=run.objectives.options,
        masks=masks(run.objectives.masks, run.parallel.seed),
        attention_heads=backbone.heads,
        local_crops=bool(run.data.crops.local_crops),
    )


def build_branches(model: Model, objectives: Sequence[Objective]) -> tuple[Student, Teacher]:
    """Both branches of a run, with a head per objective; the teacher starts as a copy of the student."""
    backbone = backbone_of(model)
    if model.freeze_patch_embed:
        freeze_patch_embed(model.arch, backbone)
    return build_branches_on(backbone, model.summary, objectives)


def backbone_of(model: Model) -> Backbone:
    """The student's backbone that a run describes."""
    # Options of vision transformers only. Other backbones get those that differ from the default, and refuse them.
    options = {name: getattr(model, name) for name in ("position_resize", "positions", "start")}
    if "class_token" in capabilities_of(model.arch):
        options["class_token"] = model.summary == "cls"
    else:
        options = {name: value for name, value in options.items() if value != getattr(Model, name)}
    sizes = {"patch_size": model.patch_size, "image_size": model.image_size, **model.sizes}
    return build_backbone(model.arch, drop_path=model.drop_path, **options, **sizes)


def freeze_patch_embed(arch: str, backbone: nn.Module) -> None:
    """Keeps the patch projection as it was initialized."""
    check(
        hasattr(backbone, "patch_embed"),
        "Model.freeze_patch_embed needs a patch projection",
        f"{arch}, which has none",
        "leave it out",
    )
    backbone.patch_embed.requires_grad_(False)


def with_loader(run: Run, device: torch.device, source: OwnImages | None) -> tuple[Run, str]:
    """The run with its loader, so that reports name it, and why it is this one. A source is named by its class."""
    data = run.data
    if source is not None:
        loader = "auto" if data.loader == "procedural" else data.loader
        data = replace(data, path=f"{PASSED}{type(source).__name__}", loader=loader)
    choice = loaders.choose_loader(data.loader, device, data.own)
    return replace(run, data=replace(data, loader=choice.name)), choice.why


def build_loader(run: Run, mesh: Mesh, source: OwnImages | None = None) -> Loader:
    """The loader of a run, for this rank. source: a data set of the user's own, in place of Data.path."""
    data, seed = run.data, run.parallel.seed
    images: Source | ImageStream
    if source is not None:
        images = open_own(source, data.most_pixels)
    else:
        data.check_path()
        generated = data.loader == "procedural"
        images = (
            ProceduralSource(data.procedural_images, seed=seed)
            if generated
            else open_images(data.path, data.most_pixels)
        )
    options: dict[str, Any] = {
        "seed": seed,
        "rank": mesh.rank,
        "world": mesh.world,
        "workers": data.workers,
        "device": mesh.device,
        "most_bad": data.most_bad,
        "report": Path(run.output.folder) / BAD_FILES,
        "timeout": data.timeout,
    }
    if not isinstance(images, ImageStream):
        chosen = data.loader, images, data.crops, data.batch_per_rank
        return loaders.build_loader(*chosen, photometric=data.photometric, **options)
    steps = run.schedule.steps_per_epoch
    rule = "A run over an iterable needs Schedule.steps_per_epoch, as an iterable has no length"
    if steps is None:
        raise ValueError(sentence(rule, "none", "set how many steps count as an epoch"))
    options |= {"epoch_images": steps * run.global_batch(mesh.world), "most_pixels": data.most_pixels}
    return loaders.build_stream_loader(images, data.crops, data.batch_per_rank, **options)


def build_metrics(run: Run, mesh: Mesh, objectives: WeightedObjectives) -> Metrics:
    """The metrics of a run; on rank 0 with the journal that writes them."""
    track = trackers_of(run.output.track)  # an error on every rank if a package is missing
    journal = Journal(run.output.folder, Display(), track) if mesh.rank == 0 else None
    return Metrics(mesh, journal, objectives.prototype_counts(), cost_of(run, mesh.device))


def build_step_values(run: Run, mesh: Mesh, objectives: WeightedObjectives, clock: Clock) -> StepValues:
    """The numbers of the optimizer and of the objectives that change from step to step."""
    batch = run.global_batch(mesh.world)

    def schedule(clock: Clock) -> dict[str, float]:
        return rates_at(clock, run.optim, batch) | objectives.schedule(clock)

    return StepValues(schedule, clock, mesh.device, run.data.batch_per_rank)


def build_clock(run: Run, world: int, dataset_size: int) -> Clock:
    """The clock at the start of a run."""
    batch = run.global_batch(world)
    steps = run.schedule.steps_per_epoch or dataset_size // batch
    check(
        steps > 0,
        "An epoch needs at least one global batch",
        f"{dataset_size} images for {batch}",
        "use a smaller batch or set Schedule.steps_per_epoch",
    )
    return Clock(0, run.schedule.epochs * steps, 0, steps)
