"""kill -9 and SIGTERM at random moments, in chains: kill, check, resume, kill again, up to the end of the run."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from faults.checkpoints import wrong_checkpoints
from faults.child import Kill, Plan
from faults.launcher import KILLED, PATIENCE, Launched
from faults.tiny import (
    CONFIGURATIONS,
    STEPS,
    Outcome,
    Truth,
    lines_of,
    output_of,
    read_notes,
    resumed,
    small_run,
    steps_in,
    truth_of,
    wrong_states,
)

TO_END = 10.0  # seconds that processes have to end after kill -9 of one of them, or of their launcher


@dataclass
class Chain:
    """A run that is killed and resumed until it ends."""

    name: str
    truth: Truth
    folder: Path
    reported: int = 0  # the newest step of a checkpoint that was reported complete
    kills: int = 0
    over: bool = False

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def advance(self, shot: Shot | None) -> Outcome:
        """Starts or resumes the run; the shot may come too late, then the run ends."""
        processes, notes = self.truth.processes, self.folder / f"notes-{self.kills}"
        run = small_run(self.run_folder, self.name)
        run = resumed(run) if self.folder.exists() else run
        kill = Kill(shot.rank, shot.operation, shot.victim, shot.signal) if shot and shot.operation else None
        launched = Launched(Plan(run, notes, kill), processes)
        try:
            if shot and not kill:
                launched.launcher.join(shot.seconds)
                launched.kill(shot.victim, shot.signal, shot.rank)
            launched.launcher.join(PATIENCE)
            # SIGTERM lets a run save; after kill -9 the other processes have nothing to wait for.
            began = time.perf_counter()
            in_time = launched.ended(TO_END)
            took = time.perf_counter() - began
        finally:
            launched.end()
        seen = read_notes(notes)
        ended = [line["rank"] for line in seen if line["event"] == "ended" and line["step"] == STEPS]
        self.over = len(ended) == processes
        lost = self._loss(seen, notes) if in_time else f"processes went on for {TO_END} s"
        lost = lost or ("a process went on after SIGTERM" if launched.launcher.exitcode == KILLED else "")
        what = f"{self.name}: {shot or 'no kill'}" if not self.over else f"{self.name}: end after {self.kills} kills"
        if shot is None and not self.over and not lost:
            lost = f"did not end: {output_of(notes)[-300:]}"
        self.kills += 1
        if self.over and not lost:
            shutil.rmtree(self.folder)
        self.over |= bool(lost)
        return Outcome(what, f"at step {self.reported}, ended in {took:.1f} s", lost)

    def _loss(self, seen: list[dict], notes: Path) -> str:
        """Why something is lost."""
        began = [line["step"] for line in seen if line["event"] == "began"]
        if began and min(began) < self.reported:
            return f"resumed from step {min(began)}, though the checkpoint of step {self.reported} was complete"
        self.reported = max([self.reported, *(line["step"] for line in seen if line["event"] == "complete")])
        newest = max([0, *steps_in(self.run_folder)])
        wrong = [f"the complete checkpoint of step {self.reported} is gone"] if newest < self.reported else []
        wrong += wrong_states(seen, self.truth, "began") + wrong_states(seen, self.truth, "ended")
        wrong += wrong_checkpoints(self.run_folder, self.truth)
        if self.over:
            here, there = lines_of(self.run_folder), lines_of(self.truth.folder)
            wrong += (
                [] if here == there else [f"metrics.jsonl has {len(set(here) & set(there))} right of {len(here)} lines"]
            )
        return "; ".join(wrong[:3])


def tries(rng: np.random.Generator, workspace: Path, count: int) -> Iterator[Outcome]:
    """Kills of each configuration in turn; at the end, every run that was killed is resumed up to its end."""
    chains: dict[str, Chain] = {}
    for number in range(count):
        name = list(CONFIGURATIONS)[number % len(CONFIGURATIONS)]
        if name not in chains:
            truth = truth_of(workspace, small_run(Path("unused"), name), CONFIGURATIONS[name][0])
            chains[name] = Chain(name, truth, workspace / f"kills-{name.replace(' ', '-')}-{number}")
        yield chains[name].advance(draw_shot(rng, chains[name]))
        if chains[name].over:
            del chains[name]
    for chain in chains.values():
        yield chain.advance(None)


@dataclass(frozen=True)
class Shot:
    """A signal to a rank, to all processes or to the launcher, at a file operation or after some seconds."""

    victim: str
    rank: int
    signal: int
    operation: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        victim = f"rank {self.rank}" if self.victim == "rank" else self.victim
        when = f"at file operation {self.operation}" if self.operation else f"after {self.seconds:.2f} s"
        return f"{signal.Signals(self.signal).name} to {victim} {when}"


def draw_shot(rng: np.random.Generator, chain: Chain) -> Shot:
    """Half of them aim at a file operation below checkpoints/; three of four are kill -9."""
    truth = chain.truth
    left = 1 - max([0, *steps_in(chain.run_folder)]) / STEPS
    victim = str(rng.choice(["rank", "all", "launcher"] if truth.processes > 1 else ["rank"]))
    number = int(rng.choice([signal.SIGKILL, signal.SIGTERM], p=[0.75, 0.25]))
    rank = int(rng.integers(truth.processes)) if victim == "rank" else 0
    if rng.random() < 0.5:
        return Shot(victim, rank, number, operation=int(rng.integers(1, max(2, truth.operations[rank] * left))))
    return Shot(victim, rank, number, seconds=rng.uniform(0, truth.seconds * max(left, 0.1)))
