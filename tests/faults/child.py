"""What a process of a run does here besides training: it writes down its states, and lets a fault happen."""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from faults.file_operations import PREPARES, Count, Listener, Operation, Record, watch

from patchlight.recipes import command
from patchlight.run import Run

ORPHAN_PAUSE = 0.5  # seconds per step of an orphan: its run would go on for long


@dataclass(frozen=True)
class Kill:
    """A signal at the n-th operation below checkpoints/ of one rank."""

    rank: int
    number: int
    victim: str  # rank, all, launcher
    signal: int

    def listener(self, plan: Plan, rank: int) -> Listener | None:
        return Count(self.number, lambda _: self.now(), "checkpoints/") if rank == self.rank else None

    def now(self) -> None:
        """Sends the signal from within the rank."""
        if self.victim == "all":
            os.killpg(0, self.signal)
        else:
            os.kill(os.getpid() if self.victim == "rank" else os.getppid(), self.signal)


@dataclass(frozen=True)
class Full:
    """No space left on the device, from the n-th operation of rank 0 on, for so many operations."""

    first: int
    count: int
    found: Path  # the operation that was refused first is written there

    def listener(self, plan: Plan, rank: int) -> Listener | None:
        return Refuse(self, plan.notes / "operations.txt") if rank == 0 else None


class Refuse(Listener):
    """Raises for operations that need space, and lists them."""

    def __init__(self, full: Full, listed: Path) -> None:
        self.full, self.seen, self.listed = full, 0, listed.open("w")

    def before(self, operation: Operation) -> None:
        if operation.name not in PREPARES:
            return
        self.seen += 1
        print(operation.name, operation.path, file=self.listed, flush=True)
        if self.full.first <= self.seen < self.full.first + self.full.count:
            with self.full.found.open("a") as file:
                print(operation.name, operation.path, file=file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)


@dataclass(frozen=True)
class Recorded:
    """Nothing happens, but all operations are recorded."""

    path: Path

    def listener(self, plan: Plan, rank: int) -> Listener | None:
        return Record(self.path)


@dataclass(frozen=True)
class Counted:
    """Nothing happens, but the operations are counted."""

    beginning: str = "checkpoints/"

    def listener(self, plan: Plan, rank: int) -> Listener | None:
        return Count(0, lambda _: None, self.beginning)


@dataclass(frozen=True)
class Plan:
    """A run, the folder for what is found out about it, and a fault."""

    run: Run
    notes: Path
    fault: Kill | Full | Recorded | Counted | None = None
    every_step: bool = False  # a fingerprint after each step
    only_begin: bool = False  # resumes, and does not train


def fingerprint(trainer) -> str:
    """A number that depends on every bit of what the next step depends on, on this rank."""
    parts = {
        "student": trainer.student.state_dict(),
        "teacher": trainer.teacher.state_dict(),
        "objectives": trainer.objectives.state_dict(),
        "optimizer": trainer.update.state_dict(),
        "clock": trainer.clock.state(),
        "loader": trainer.batches.state_dict(),
        "random": [torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())],  # noqa: NPY002
    }
    digest = hashlib.blake2b(digest_size=16)

    def add(name: str, value) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list):
            for number, part in enumerate(value):
                add(f"{name}.{number}", part)
        else:
            tensor = value.to_local() if hasattr(value, "to_local") else value
            data = tensor.detach().contiguous().numpy().tobytes() if isinstance(tensor, torch.Tensor) else repr(value)
            digest.update(name.encode() + (data.encode() if isinstance(data, str) else data))

    add("", parts)
    return digest.hexdigest()


class Notes:
    """Lines of one rank about its trainer; in a file outside of the run's folder, so that no fault reaches it."""

    def __init__(self, plan: Plan, rank: int, listener: Listener | None) -> None:
        self.plan, self.rank, self.listener, self.parent = plan, rank, listener, os.getppid()
        self.file = (plan.notes / f"rank-{rank}.jsonl").open("a")
        self.unfinished: int | None = None

    def write(self, event: str, **values) -> None:
        self.file.write(json.dumps({"event": event, "rank": self.rank, **values}) + "\n")
        self.file.flush()

    def state(self, event: str, trainer) -> None:
        self.write(event, step=trainer.clock.step, fingerprint=fingerprint(trainer))

    def complete(self, step: int) -> None:
        """A checkpoint was reported as complete."""
        self.write("complete", step=step)
        if isinstance(self.listener, Record) and self.rank == 0:
            self.listener.note("complete", step)

    def attach(self) -> None:
        """Writes a line when a trainer has begun, made a step, saved, and ended."""
        from patchlight.engine.trainer import Trainer

        begin, step, save, fit = Trainer.begin, Trainer.step, Trainer.save, Trainer.fit

        def begins(trainer) -> None:
            begin(trainer)
            self.state("began", trainer)
            if self.plan.only_begin:
                raise SystemExit(0)

        def steps(trainer) -> None:
            step(trainer)
            random.random(), np.random.rand()  # noqa: NPY002 so that their states are worth keeping
            if self.plan.every_step:
                self.state("step", trainer)
            if os.getppid() != self.parent:
                time.sleep(ORPHAN_PAUSE)

        def saves(trainer, *best) -> None:
            save(trainer, *best)
            if not trainer.run.output.save_async:
                self.complete(trainer.clock.step)
                return
            if self.unfinished is not None:  # a save waits for the one before it
                self.complete(self.unfinished)
            self.unfinished = trainer.clock.step

        def fits(trainer) -> None:
            fit(trainer)
            if self.unfinished is not None:
                self.complete(self.unfinished)
            self.state("ended", trainer)

        Trainer.begin, Trainer.step, Trainer.save, Trainer.fit = begins, steps, saves, fits


def train(plan: Plan, rank: int) -> None:
    """Trains as train.py does, up to the sentences of its errors; ends the process."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # Linux's, in place of that of this child
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    for descriptor in (1, 2):
        os.dup2(os.open(plan.notes / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    faulthandler.enable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    listener = plan.fault.listener(plan, rank) if plan.fault else None
    notes = Notes(plan, rank, listener)
    notes.attach()
    if listener is not None:
        watch(Path(plan.run.output.folder), listener)
    command._run_of = lambda *_: plan.run  # the run that the words below stand for
    code = 0
    try:
        command.main(["debug"])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = 1 if isinstance(end.code, str) else int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(listener, Count):
        notes.write("operations", count=listener.seen)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
