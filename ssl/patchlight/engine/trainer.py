"""The trainer: the step and the loop. `assembly.build_trainer` builds it from a `Run`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..checkpoint.best import Best
from ..checkpoint.folder import load_tensors, read_facts, stored_tensors
from ..checkpoint.random_state import blank_random_state, random_state, set_random_state
from ..data.interface import Loader
from ..durable import write_whole
from ..process import StopRequest
from ..records import Clock, Views
from ..report.console import print_sentence
from ..report.run_folder import RUN_FILE
from ..report.step_profile import StepProfile
from ..run import Run
from .batches import Batches
from .checkpoint import (
    Checkpoints,
    check_fits,
    check_folder,
    check_same_run,
    locked,
    timm_weights,
)
from .device_step import DeviceStep
from .graph import Recorder, RepeatedStep
from .metrics import Metrics
from .parallel import Mesh
from .probe import TeacherProbe
from .sentinels import Sentinels, TrainingError
from .settings_table import settings_table

GO_ON = "continue with --output.resume (in Python: Output.resume=True)"


class Trainer:
    """One run on one process of its mesh."""

    def __init__(
        self,
        run: Run,
        mesh: Mesh,
        device_step: DeviceStep,
        loader: Loader,
        metrics: Metrics,
        checkpoints: Checkpoints,
        clock: Clock,
        recorder: Recorder | None = None,
        choices: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        """recorder: of the step, on a GPU. choices: what was chosen for this run, and why."""
        self.run, self.mesh, self.folder = run, mesh, Path(run.output.folder)
        self.device_step, self.step_values = device_step, device_step.values
        self.student, self.teacher = device_step.student, device_step.teacher
        self.objectives, self.update, self.scaler = device_step.objectives, device_step.update, device_step.scaler
        self.metrics, self.checkpoints, self.clock = metrics, checkpoints, clock
        self.choices = dict(choices or {})
        self.sentinels = Sentinels(self.student, self.teacher, self.update, mesh, self.objectives.prototype_counts())
        self.global_batch = run.global_batch(mesh.world)
        self.batches = Batches(loader, run.parallel.accumulate, mesh.device)
        self.repeated_step = RepeatedStep(device_step, recorder, self.not_recorded, run.parallel.graph == "on")
        self.probe: TeacherProbe | None = None
        self.first_probe: dict[str, float] = {}
        self.last_rates: dict[str, float] = {}

    @property
    def loader(self) -> Loader:
        return self.batches.loader

    def fit(self) -> None:
        """Trains to the end, or until SIGTERM or Ctrl-C; writes a checkpoint in all cases."""
        with locked(self.folder, self.mesh, self.say), StopRequest() as request:
            self.begin()
            if self.clock.step >= self.clock.total:
                self.say(f"Nothing left to do: {self.clock.step} of {self.clock.total} steps are done.")
            if self.probe is not None and self.look_is_due() and self.mesh.any(self.probe.lacks(self.clock)):
                found = self.evaluate_teacher()
                self.first_probe = found if self.clock.step == 0 else self.first_probe
            try:
                stopped = self.train(request)
                self.checkpoints.finish()
            finally:
                if self.probe is not None:
                    self.probe.close()
                self.metrics.close()
        if stopped:
            self.say(f"Stopped by {stopped} after step {self.clock.step}; {GO_ON}.")

    def train(self, request: StopRequest) -> str:
        """The loop: steps, log lines, checkpoints, looks at the teacher. Returns what has stopped it before the end."""
        output, stopped = self.run.output, ""
        first, began = self.clock.step + 1, time.perf_counter()
        while self.clock.step < self.clock.total and not stopped:
            self.profile(self.step, self.clock.step + 1)
            if self.clock.step == first:
                self.say(f"The first step took {time.perf_counter() - began:.1f} s.")
            last = self.clock.step == self.clock.total
            line = last or 0 in (self.clock.step % output.log_every, self.clock.step % self.clock.steps_per_epoch)
            if line:
                self.log()
            # Ranks must stop at the same step. Agreeing costs time: several ranks do it at log lines only.
            if (line or self.mesh.world == 1) and self.mesh.any(bool(request.received)):
                stopped = request.received or "a signal to another process"
            if last or stopped or self.clock.step % output.save_every == 0:
                self.save()
            if self.look_is_due() and not stopped:  # if it is stopped, the resumed run takes this look
                self.evaluate_teacher()
        self.profile.close()
        return stopped

    def look_is_due(self) -> bool:
        """Whether the teacher is evaluated at this step."""
        every = self.run.output.evaluate_every or self.clock.steps_per_epoch
        return self.clock.step == self.clock.total or self.clock.step % every == 0

    def step(self) -> None:
        """One optimizer step, over one or more batches."""
        numbers = self.step_values.write(self.clock)
        self.last_rates = {name: numbers[name] for name in ("lr", "weight_decay", "momentum")}
        self.metrics.add(self.repeated_step(self.next_batches()))
        self.clock = self.clock.next(self.global_batch)
        if self.repeated_step.recorded and self.clock.step < self.clock.total:
            self.batches.read_ahead()

    def next_batches(self) -> Iterator[Views]:
        """The batches of the next step."""
        for number, views in enumerate(self.batches):
            if self.probe is not None and self.clock.step == number == 0:
                self.probe.draw_crops(views)
            yield views

    def not_recorded(self, reason: str) -> None:
        """Goes on with steps that are launched, after a recording failed."""
        self.student.zero_grad()
        self.say(f"Steps are launched from Python: recording one failed: {reason}.")

    def evaluate_teacher(self) -> dict[str, float]:
        """The probe's results, if there is one; printed beside those of the untrained teacher."""
        if self.probe is None:
            return {}
        result = self.probe.evaluate(self.teacher, self.clock)
        self.metrics.look(self.clock, result, self.probe.take_pictures())
        for name, accuracy in result.items():
            before = f", untrained {self.first_probe[name]:.1%}" if name in self.first_probe else ""
            self.say(f"step {self.clock.step}: k-NN accuracy of the teacher ({name}) {accuracy:.1%}{before}")
        if self.run.output.best and self.clock.step > 0:  # the untrained teacher is no result of the training
            best = Best(self.run.output.best, result.get(self.run.output.best, math.nan), self.clock.step)
            self.checkpoints.keep_if_best(best, self.save, self.say)
        return result

    def log(self) -> None:
        """A log line and the sentinels' diagnoses; the only place where the host waits for the device."""
        waited = {"data/wait_seconds": self.batches.stalled, "data/replaced": float(self.loader.replaced)}
        waited["data/pixel_rms"] = self.batches.pixel_rms()
        means = self.metrics.log(self.clock, self.last_rates | waited)
        self.batches.stalled = 0.0
        for diagnosis in self.sentinels.check(self.clock, means):
            self.metrics.diagnose(self.clock, diagnosis)
            if diagnosis.fatal:
                raise TrainingError(f"{diagnosis.name}: {diagnosis.sentence}")
        self.checkpoints.finish(wait=False)

    def begin(self) -> None:
        """Starts anew or resumes, and prints the settings that follow from the batch."""
        resume = self.run.output.resume
        check_folder(self.folder, resume)
        self.mesh.barrier()  # no rank writes into the folder before all have checked it
        if resume:
            newest = self.checkpoints.newest_whole(self.say)
            if newest is None:
                self.say(f"Nothing to resume in {self.folder}: starting anew.")
            else:
                self.load(newest)
        mesh, left = self.mesh, self.clock.total - self.clock.step
        self.profile = StepProfile(self.folder, self.run.output.profile, left, mesh.device, mesh.rank, mesh.world)
        if self.probe is not None:
            self.first_probe = self.probe.rewind(self.clock)
            if self.run.output.best:
                self.checkpoints.resume_best(self.run.output.best, self.probe.looks, self.say)
        if mesh.rank == 0:
            write_whole(self.folder / RUN_FILE, json.dumps(self.run.to_dict(), indent=1))
            Console().print(settings_table(self.run, self.clock, mesh.world, self.loader.dataset_size, self.choices))

    def save(self, best: Best | None = None) -> None:
        """Writes a checkpoint: everything that the next step depends on, and the teacher for use elsewhere.

        best: the look of this step, if it is the best so far.
        """
        facts = {
            "clock": self.clock.state(),
            "run": self.run.to_dict(),
            "loader": self.batches.state_dict(),
            "processes": self.mesh.world,
            "torch": torch.__version__,
        }
        random_numbers = {f"rank{self.mesh.rank}": random_state(self.mesh.device)}
        state: dict[str, Any] = {**self.tensors(), "optimizer": self.update.state_dict(), "random": random_numbers}
        self.checkpoints.save(self.clock.step, state, facts, timm_weights(self.teacher), best)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint, which any number of processes may have written."""
        facts, stored = read_facts(path), stored_tensors(path)
        check_same_run(facts["run"], json.loads(json.dumps(self.run.to_dict())), path)
        if change := self.run.batch_change(facts["run"], facts["processes"], self.mesh.world):
            self.say(f"note: {change}")
        check_fits({"student": self.student, "teacher": self.teacher, "objectives": self.objectives}, stored, path)
        rank, world = self.mesh.rank, self.mesh.world
        state: dict[str, Any] = {**self.tensors(), "optimizer": self.update.blank_state(stored)}
        if "scaler.scale" not in stored:  # written with another precision
            state.pop("scaler", None)
        if facts["processes"] == world:
            state["random"] = {f"rank{rank}": blank_random_state(stored, rank)}
        load_tensors(path, state, alone=world == 1)
        self.update.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(facts["loader"])
        self.clock = replace(self.clock, step=facts["clock"]["step"], images_seen=facts["clock"]["images_seen"])
        if facts["processes"] == world:
            set_random_state(state["random"][f"rank{rank}"], self.mesh.device)
        else:
            torch.manual_seed(self.run.parallel.seed + 1 + rank + world * self.clock.step)
            self.say(f"Written by {facts['processes']} processes, read by {world}: drop path has new random numbers.")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds besides the optimizer's state and random numbers; loading writes into these."""
        modules = {"student": self.student, "teacher": self.teacher, "objectives": self.objectives}
        state = {name: module.state_dict() for name, module in modules.items()}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def say(self, sentence: str) -> None:
        """Prints a sentence on rank 0."""
        if self.mesh.rank == 0:
            print_sentence(sentence)
