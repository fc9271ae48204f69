"""The runs that faults happen to, what they are without a fault, and what is checked after one."""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.tiny_run import tiny_run
from faults.child import Counted, Plan
from faults.launcher import PATIENCE, Launched

from patchlight.run import Run

STEPS, SAVE_EVERY = 60, 3
CONFIGURATIONS = {  # processes, shards, asynchronous; a few tries take the first ones
    "1 process": (1, 1, False),
    "2 shards async": (2, 2, True),
    "2 replicas": (2, 1, False),
    "1 process async": (1, 1, True),
    "2 replicas async": (2, 1, True),
    "2 shards": (2, 2, False),
}


@dataclass(frozen=True)
class Outcome:
    """A try: what was done, what came of it; why something was lost, or why it could not be tried."""

    what: str
    result: str = ""
    lost: str = ""
    skipped: str = ""


def small_run(folder: Path, configuration: str = "1 process", steps: int = STEPS, keep: int = 2, **parts) -> Run:
    """60 steps with a log line each and 20 saves, in two seconds."""
    _, shards, asynchronous = CONFIGURATIONS[configuration]
    output = {"folder": str(folder), "save_every": SAVE_EVERY, "log_every": 1, "keep": keep, "evaluate_every": 0}
    output |= {"save_async": asynchronous} | parts.pop("output", {})
    model = {"image_size": 16, "patch_size": 4, "drop_path": 0.2, "sizes": {"width": 20, "depth": 2, "heads": 2}}
    data = {"procedural_images": 64, "batch_per_rank": 4} | parts.pop("data", {})
    return tiny_run(
        folder,
        model=model,
        data=data,
        schedule={"epochs": 4, "steps_per_epoch": steps // 4},
        parallel={"precision": "fp32", "shard": shards},
        output=output,
        **parts,
    )


def resumed(run: Run) -> Run:
    return replace(run, output=replace(run.output, resume=True))


def read_notes(folder: Path) -> list[dict]:
    """The lines of all ranks' notes. A last line cut short by a kill is left out."""
    lines = [line for path in sorted(folder.glob("rank-*.jsonl")) for line in path.read_text().splitlines(True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def output_of(folder: Path) -> str:
    """What all ranks printed."""
    return "".join(path.read_text(errors="replace") for path in sorted(folder.glob("output-*.txt")))


@dataclass
class Truth:
    """A run to which nothing happened."""

    run: Run
    processes: int
    states: dict[int, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))  # by step and rank
    operations: dict[int, int] = field(default_factory=dict)  # below checkpoints/, by rank
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        return Path(self.run.output.folder)

    def step_folder(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"


_truths: dict[tuple, Truth] = {}


def truth_of(workspace: Path, run: Run, processes: int = 1, fault=None) -> Truth:
    """Runs it once, keeping all checkpoints, with the state after every step. fault: one that does nothing."""
    key = (workspace, repr(replace(run, output=replace(run.output, folder=""))), processes)
    if key in _truths:
        return _truths[key]
    place = workspace / f"truth-{len(_truths)}"
    shutil.rmtree(place, ignore_errors=True)
    run = replace(run, output=replace(run.output, folder=str(place / "run"), keep=1000))
    launched = Launched(Plan(run, place / "notes", fault or Counted(), every_step=True), processes)
    ended = launched.ended()
    launched.end()
    truth = Truth(run, processes, seconds=time.perf_counter() - launched.began)
    for line in read_notes(place / "notes"):
        if "fingerprint" in line:
            truth.states[line["step"]][line["rank"]] = line["fingerprint"]
        if line["event"] == "operations":
            truth.operations[line["rank"]] = line["count"]
    complete = ended and set(truth.states.get(run.schedule.epochs * run.schedule.steps_per_epoch, {})) == set(
        range(processes)
    )
    assert complete, f"the run fails without a fault:\n{output_of(place / 'notes')[-3000:]}"
    _truths[key] = truth
    return truth


def steps_in(run_folder: Path) -> list[int]:
    """The steps of the checkpoints that have a final name."""
    names = [path.name for path in (run_folder / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def wrong_states(notes: list[dict], truth: Truth, event: str) -> list[str]:
    """Ranks whose state at an event is not that of the run without a fault."""
    lines = [line for line in notes if line["event"] == event]
    return [
        f"rank {line['rank']} has {event} with a state at step {line['step']} that differs"
        for line in lines
        if truth.states[line["step"]].get(line["rank"]) != line["fingerprint"]
    ]


def lines_of(run_folder: Path) -> list[tuple]:
    """The numbers of metrics.jsonl that depend on no clock."""
    text = (run_folder / "metrics.jsonl").read_text()
    return [(line["step"], line["loss"], line["steps"]) for line in map(json.loads, text.splitlines())]


@dataclass(frozen=True)
class Ended:
    """What is known about a run that has ended."""

    in_time: bool
    code: int | None
    notes: list[dict]
    output: str

    def step(self, event: str) -> int | None:
        """The step of the first such event; None if it did not happen."""
        return next((line["step"] for line in self.notes if line["event"] == event), None)


def run_to_end(plan: Plan, processes: int = 1, seconds: float = PATIENCE) -> Ended:
    """Runs without a disturbance from outside."""
    launched = Launched(plan, processes)
    try:
        in_time = launched.ended(seconds)
    finally:
        launched.end()
    return Ended(in_time, launched.launcher.exitcode, read_notes(plan.notes), output_of(plan.notes))
