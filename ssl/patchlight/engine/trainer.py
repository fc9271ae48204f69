"""The trainer: builds a run, and takes its steps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..data import loaders
from ..data.procedural import ProceduralSource
from ..data.reading import REPORT_FILE as BAD_FILES
from ..data.sources import open_source
from ..records import Clock, Views
from ..report.console import print_sentence
from ..report.run_folder import REPORT_FILE, RUN_FILE, write_whole
from ..run import Run
from ..threads import considerate_threads
from .branches import Teacher, build_branches, build_objectives, check_teacher_student
from .checkpoint import (
    Checkpoints,
    StopRequest,
    blank_random_state,
    check_fits,
    check_same_run,
    load_tensors,
    random_state,
    read_facts,
    set_random_state,
    stored_tensors,
    timm_weights,
)
from .init_from import init_from
from .metrics import build_metrics
from .optim import StepState, Update
from .parallel import Mesh, parallelize, processes, set_gradient_sync
from .precision import autocast, build_scaler
from .schedules import cosine
from .sentinels import Diagnosis, Sentinels, TrainingError, spread


class Loader(Protocol):
    """An endless iterator of Views on the device, whose state is a position that means the same for any ranks."""

    dataset_size: int
    stall_seconds: float  # how long the last next() waited for data
    replaced: int  # unreadable images that another took the place of, so far

    def __next__(self) -> Views: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Metrics(Protocol):
    """Where numbers go. Called on every rank."""

    def add(self, terms: dict[str, Tensor]) -> None:
        """Takes note of one step's device numbers, without waiting for them."""
        ...

    def log(self, clock: Clock, values: dict[str, float]) -> dict[str, float]:
        """A log line: the means over ranks and over the steps since the last one, which it returns, and host values."""
        ...

    def diagnose(self, clock: Clock, diagnosis: Diagnosis) -> None:
        """Says by name what is wrong."""
        ...

    def close(self) -> None:
        """Called when a run ends, after its last look at the teacher."""
        ...


def train(run: Run) -> None:
    """Trains on the processes that torchrun started, or on this one alone, and looks at the teacher meanwhile."""
    with processes(run.parallel) as mesh:
        trainer = Trainer(run, mesh)
        if run.output.look_every != 0:
            trainer.probe = build_probe(run, trainer)
        try:
            with considerate_threads(trainer.say):
                trainer.fit()
        finally:
            trainer.loader.close()
        trainer.say(
            f"Report: {trainer.folder / REPORT_FILE}; teacher: {trainer.checkpoints.latest()}/teacher.safetensors"
        )


class Probe(Protocol):
    """Who looks at the teacher while it trains. Called on every rank."""

    def rewind(self, clock: Clock) -> dict[str, float]:
        """Forgets looks later than the clock, which a resumed run takes again; returns that of the untrained teacher."""
        ...

    def show_crops(self, views: Views) -> None:
        """Sees the run's first batch."""
        ...

    def look(self, teacher: Teacher, clock: Clock) -> dict[str, float]:
        """What there is to say of the teacher, by name."""
        ...


class Trainer:
    """One run on one process among its `mesh`; without one it is alone."""

    def __init__(
        self, run: Run, mesh: Mesh | None = None, loader: Loader | None = None, metrics: Metrics | None = None
    ) -> None:
        self.mesh = mesh or Mesh(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        parallel, device = run.parallel, self.mesh.device
        self.loader_choice: loaders.LoaderChoice | None = None
        if loader is None:
            self.loader_choice = loaders.choose_loader(run.data.loader, device)
            run = replace(run, data=replace(run.data, loader=self.loader_choice.name))  # reports say what really ran
        self.run = run
        torch.manual_seed(parallel.seed)  # the same weights on every rank, each of which then keeps its shard
        self.objectives = build_objectives(run, self.mesh.world).to(device)
        self.student, self.teacher = build_branches(run.model, self.objectives.parts)
        if run.model.init_from:
            taken = init_from(self.student, Path(run.model.init_from))
            self.teacher.start_from(self.student)
            self.say(taken.table())
        parallelize(self.student, parallel, self.mesh, trained=True)
        parallelize(self.teacher, parallel, self.mesh, trained=False)
        check_teacher_student(self.teacher, self.student)
        torch.manual_seed(parallel.seed + 1 + self.mesh.rank)  # dropped paths differ between ranks
        self.scaler = build_scaler(parallel.precision, device)
        self.update = Update(self.student, run.optim, self.mesh, self.scaler)
        self.step_state = StepState(self.student, self.teacher, self.objectives)
        self.loader = loader or build_loader(run, self.mesh)
        self.metrics = metrics or build_metrics(run, self.mesh)
        self.sentinels = Sentinels(self.student, self.teacher, self.update, self.mesh)
        self.folder = Path(run.output.folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.mesh, run.output.keep, run.output.save_async)
        self.global_batch = run.data.batch_per_rank * self.mesh.world * parallel.accumulate
        steps = run.schedule.steps_per_epoch or self.loader.dataset_size // self.global_batch
        if steps == 0:
            raise ValueError(
                f"An epoch needs at least one global batch, got {self.loader.dataset_size} images for {self.global_batch}; "
                "use a smaller batch or set Schedule.steps_per_epoch."
            )
        self.clock = Clock(0, run.schedule.epochs * steps, 0, steps)
        self.probe: Probe | None = None
        self.first_look: dict[str, float] = {}
        self.rates: dict[str, float] = {}  # of the last step
        self.waited = 0.0  # seconds for data since the last log line

    def fit(self) -> None:
        """Trains to the end, or until SIGTERM; leaves a checkpoint either way."""
        self.begin()
        if self.clock.step >= self.clock.total:
            self.say(f"Nothing left to do: {self.clock.step} of {self.clock.total} steps are done.")
        elif self.clock.step == 0:
            self.first_look = self.look_at_teacher()
        output, stopped = self.run.output, False
        with StopRequest() as request:
            while self.clock.step < self.clock.total and not stopped:
                self.step()
                last = self.clock.step == self.clock.total
                line = last or 0 in (self.clock.step % output.log_every, self.clock.step % self.clock.steps_per_epoch)
                if line:
                    self.log()
                # Ranks must agree on the step they stop at, and meeting costs time: several meet on log lines only.
                stopped = self.mesh.any(request.received) if line or self.mesh.world == 1 else False
                if last or stopped or self.clock.step % output.save_every == 0:
                    self.save()
                if last or self.clock.step % (output.look_every or self.clock.steps_per_epoch) == 0:
                    self.look_at_teacher()
            self.checkpoints.finish()
        self.metrics.close()
        if stopped:
            self.say(f"Stopped by SIGTERM after step {self.clock.step}; continue with Output.resume=True.")

    def step(self) -> None:
        """One optimizer step, over one or more batches."""
        lr, weight_decay, momentum = self.lr, self.weight_decay, self.momentum
        self.step_state.remember()
        terms = self.accumulate()
        refused, norm = self.update.step(terms, lr, weight_decay, freeze=self.frozen)
        self.teacher.follow(self.student, momentum, refused)
        self.objectives.after_step(self.clock)
        self.step_state.restore(refused)
        self.rates = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        self.metrics.add(terms | {"gradient/norm": norm, "step/refused": refused})
        self.clock = self.clock.next(self.global_batch)

    def accumulate(self) -> dict[str, Tensor]:
        """Gradients of the mean loss over the step's batches; the mean terms."""
        batches = self.run.parallel.accumulate
        total: dict[str, Tensor] = {}
        for number in range(batches):
            set_gradient_sync(self.student, number == batches - 1)
            views = next(self.loader)
            if self.probe is not None and self.clock.step == number == 0:
                self.probe.show_crops(views)
            self.waited += self.loader.stall_seconds
            loss, terms = self.look(views)
            loss = loss / batches
            (loss if self.scaler is None else self.scaler.scaled(loss)).backward()
            for name, term in terms.items():
                total[name] = total.get(name, 0.0) + term.detach() / batches
        return total

    def look(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Both branches look, the objectives compare: the loss, and its terms with a few numbers to watch."""
        goals = self.objectives
        with autocast(self.run.parallel.precision, self.mesh.device):
            with torch.no_grad():
                taught = self.teacher(views, wanted=goals.of_teacher)
            cues = goals.cue(views, taught[0].grid, self.clock)
            seen = self.student(views, cues, goals.of_student)
            loss, terms = goals((self.student, seen), (self.teacher, taught), views, self.clock)
        return loss, terms | {"loss": loss, "teacher/spread": spread(taught[0])}

    @property
    def lr(self) -> float:
        """Linear rule: base_lr per 256 images."""
        optim, clock = self.run.optim, self.clock
        warmup = int(optim.warmup_epochs * clock.steps_per_epoch)
        peak, start, ends = optim.base_lr * self.global_batch / 256, optim.warmup_start_lr, optim.warmup_ends
        return cosine(clock.step, clock.total, peak, optim.min_lr, warmup, start, ends)

    @property
    def weight_decay(self) -> float:
        optim = self.run.optim
        return cosine(self.clock.step, self.clock.total, optim.weight_decay, optim.weight_decay_end)

    @property
    def momentum(self) -> float:
        optim = self.run.optim
        return cosine(self.clock.step, self.clock.total, optim.teacher_momentum, optim.teacher_momentum_end)

    @property
    def frozen(self) -> bool:
        """Whether the prototypes keep still."""
        return self.clock.epoch < self.run.optim.freeze_prototypes_epochs

    def look_at_teacher(self) -> dict[str, float]:
        """What the probe, if there is one, finds; said aloud beside the first look."""
        if self.probe is None:
            return {}
        found = self.probe.look(self.teacher, self.clock)
        for name, accuracy in found.items():
            before = f", untrained {self.first_look[name]:.1%}" if name in self.first_look else ""
            self.say(f"step {self.clock.step}: k-NN accuracy of the teacher ({name}) {accuracy:.1%}{before}")
        return found

    def log(self) -> None:
        """A log line and what the sentinels make of it; the one place where the host waits for the device."""
        waited = {"data/wait_seconds": self.waited, "data/replaced": float(self.loader.replaced)}
        means = self.metrics.log(self.clock, self.rates | waited)
        self.waited = 0.0
        for diagnosis in self.sentinels.check(self.clock, means):
            self.metrics.diagnose(self.clock, diagnosis)
            if diagnosis.fatal:
                raise TrainingError(f"{diagnosis.name}: {diagnosis.sentence}")
        self.checkpoints.finish(wait=False)

    def begin(self) -> None:
        """Starts anew or resumes, and says with which numbers."""
        latest = self.checkpoints.latest()
        occupied = latest is not None or (self.folder / RUN_FILE).exists()
        if occupied and not self.run.output.resume:
            raise ValueError(
                f"A new run needs a folder of its own, got {self.folder}, which holds one; "
                "set Output.resume=True to continue it, or choose another folder."
            )
        self.mesh.barrier()  # all have looked before anyone writes
        if self.run.output.resume:
            if latest is None:
                self.say(f"Nothing to resume in {self.folder}: starting anew.")
            else:
                self.load(latest)
                if self.probe is not None:
                    self.first_look = self.probe.rewind(self.clock)
        if self.mesh.rank == 0:
            write_whole(self.folder / RUN_FILE, json.dumps(self.run.to_dict(), indent=1))
            Console().print(self.summary())

    def summary(self) -> Table:
        """The numbers that follow from the batch, and how."""
        optim, parallel, clock, batch = self.run.optim, self.run.parallel, self.clock, self.global_batch
        warmup = int(optim.warmup_epochs * clock.steps_per_epoch)
        lr, peak = optim.base_lr, optim.base_lr * batch / 256
        rows = [
            (
                "global batch",
                batch,
                f"{self.run.data.batch_per_rank} x {self.mesh.world} processes x {parallel.accumulate} accumulated",
            ),
            ("steps per epoch", clock.steps_per_epoch, f"{self.loader.dataset_size} images"),
            ("steps", clock.total, f"{self.run.schedule.epochs} epochs"),
            ("base learning rate", f"{lr:g}", "per 256 images"),
            ("effective learning rate", f"{peak:g}", f"linear rule: {lr:g} x {batch} / 256"),
            ("warm-up", f"{warmup} steps", f"{optim.warmup_epochs:g} epochs, then a cosine to {optim.min_lr:g}"),
            ("weight decay", f"{optim.weight_decay:g}", f"a cosine to {optim.weight_decay_end:g}"),
            ("teacher momentum", f"{optim.teacher_momentum:g}", f"a cosine to {optim.teacher_momentum_end:g}"),
        ]
        if self.loader_choice:
            rows.insert(0, ("loader", self.loader_choice.name, self.loader_choice.why))
        if clock.step:
            rows.append(("resumed at step", clock.step, f"{clock.images_seen} images seen"))
        table = Table("", "value", "from", title=f"{self.run.model.arch}/{self.run.model.patch_size}")
        for name, value, origin in rows:
            table.add_row(name, str(value), origin)
        return table

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on, and the teacher for others to use."""
        facts = {
            "clock": asdict(self.clock),
            "run": self.run.to_dict(),
            "loader": self.loader.state_dict(),
            "processes": self.mesh.world,
            "torch": torch.__version__,
        }
        random_numbers = {f"rank{self.mesh.rank}": random_state(self.mesh.device)}
        state = {**self.tensors(), "optimizer": self.update.state_dict(), "random": random_numbers}
        self.checkpoints.save(self.clock.step, state, facts, timm_weights(self.teacher))

    def load(self, path: Path) -> None:
        """Continues from a checkpoint, which any number of processes may have written."""
        facts, stored = read_facts(path), stored_tensors(path)
        check_same_run(facts["run"], json.loads(json.dumps(self.run.to_dict())), path)
        check_fits({"student": self.student, "teacher": self.teacher, "objectives": self.objectives}, stored, path)
        rank, world = self.mesh.rank, self.mesh.world
        state = {**self.tensors(), "optimizer": self.update.blank_state(stored)}
        if "scaler.scale" not in stored:  # written with another precision
            state.pop("scaler", None)
        if facts["processes"] == world:
            state["random"] = {f"rank{rank}": blank_random_state(stored, rank)}
        load_tensors(path, state, world)
        self.update.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(facts["loader"])
        self.clock = replace(self.clock, step=facts["clock"]["step"], images_seen=facts["clock"]["images_seen"])
        if facts["processes"] == world:
            set_random_state(state["random"][f"rank{rank}"], self.mesh.device)
        else:
            torch.manual_seed(self.run.parallel.seed + 1 + rank + world * self.clock.step)
            self.say(f"Written by {facts['processes']} processes, read by {world}: dropped paths are drawn anew.")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds besides the optimizer's state and random numbers; loading writes into these."""
        modules = {"student": self.student, "teacher": self.teacher, "objectives": self.objectives}
        state = {name: module.state_dict() for name, module in modules.items()}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def say(self, sentence: str | Table) -> None:
        if self.mesh.rank == 0:
            if isinstance(sentence, str):
                print_sentence(sentence)
            else:
                Console().print(sentence)


def build_loader(run: Run, mesh: Mesh) -> Loader:
    """The loader of a run, for this rank."""
    given, seed = run.data, run.parallel.seed
    source = open_source(given.path) if given.path else ProceduralSource(given.procedural_images, seed=seed)
    return loaders.build_loader(
        given.loader,
        source,
        given.crops,
        given.batch_per_rank,
        photometric=given.photometric,
        seed=seed,
        rank=mesh.rank,
        world=mesh.world,
        workers=given.workers,
        device=mesh.device,
        most_bad=given.most_bad,
        report=Path(run.output.folder) / BAD_FILES,
    )


def build_probe(run: Run, trainer: Trainer) -> Probe:
    """Looks at the teacher through images of the trainer's own source."""
    from .probe import TeacherProbe

    return TeacherProbe(run, trainer.loader.source, trainer.folder, trainer.mesh.device, trainer.mesh.rank == 0)
