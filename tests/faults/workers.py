"""Processes that read ahead are killed or stopped: the run goes on as it would have, or ends with a sentence."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from faults.child import Plan
from faults.launcher import Launched, members
from faults.tiny import (
    Outcome,
    Truth,
    output_of,
    read_notes,
    resumed,
    run_to_end,
    small_run,
    truth_of,
    wrong_states,
)

from patchlight.run import Run

STEPS = 60
TIMEOUT = 2.0  # Data.timeout
LIMIT = 30.0  # seconds in which a run must end that had to wait for a worker


def tries(rng: np.random.Generator, workspace: Path, count: int) -> Iterator[Outcome]:
    """Kills and stops of a worker, kills of several, and kills of the run with its workers left alone."""
    for number in range(count):
        truth = truth_of(workspace, worker_run(Path("unused")))
        kind = ("kill", "stop", "kill all", "kill the trainer")[number % 4]
        yield _try(rng, workspace / f"workers-{number}", truth, kind)


def worker_run(folder: Path) -> Run:
    return small_run(folder, data={"workers": 2, "timeout": TIMEOUT}, output={"save_every": 6})


def _try(rng: np.random.Generator, folder: Path, truth: Truth, kind: str) -> Outcome:
    run = worker_run(folder / "run")
    launched = Launched(Plan(run, folder / "notes", every_step=True))
    step = int(rng.integers(1, STEPS - 10))
    try:
        while (
            launched.launcher.is_alive()
            and sum(line["event"] == "step" for line in read_notes(folder / "notes")) < step
        ):
            launched.launcher.join(0.002)
        workers = [pid for pid in members(launched.session) if pid not in launched.pids and not keeps_books(pid)]
        if not workers:
            return Outcome(f"{kind} after step {step}", lost="there are no workers")
        victims = list(workers) if kind == "kill all" else [rng.choice(workers)]
        victims = launched.pids if kind == "kill the trainer" else victims
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        if kind == "kill the trainer":
            launched.launcher.join()
            return _resume_at_once(folder, truth, f"{kind} after step {step}", launched)
        began = time.perf_counter()
        launched.launcher.join(LIMIT)
        took = time.perf_counter() - began
        in_time = not launched.launcher.is_alive() and launched.ended(10)
    finally:
        launched.end()
    seen, output = read_notes(folder / "notes"), output_of(folder / "notes")
    lost = wrong_states(seen, truth, "ended") + ([] if in_time else [f"hangs for {LIMIT} s, or a worker is left"])
    lost += [f"traceback: {output.strip().splitlines()[-1][:160]}"] if "Traceback" in output else []
    went_on = any(line["event"] == "ended" for line in seen)
    lost += [] if went_on or "train.py:" in output else ["no sentence says why it ended"]
    if not lost and not went_on:
        lost += _rest(folder, truth)
    if not lost:
        shutil.rmtree(folder)
    what = f"{kind}: {len(victims)} of {len(workers)} workers after step {step}"
    said = "said so" if "worker" in output.split("The first step took")[-1] else "said nothing"
    return Outcome(what, f"{'went on' if went_on else 'ended'} in {took:.1f} s, {said}", "; ".join(lost))


def keeps_books(pid: int) -> bool:
    """Whether a process is Python's own tracker of resources."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _resume_at_once(folder: Path, truth: Truth, what: str, launched: Launched) -> Outcome:
    """While the workers of the killed run may still be there."""
    left = len(members(launched.session))
    lost = _rest(folder, truth)
    gone = launched.ended(20)
    lost += [] if gone else [f"{len(members(launched.session))} workers outlive their run by more than 20 s"]
    if not lost:
        shutil.rmtree(folder)
    return Outcome(what, f"{left} processes were left at the resume", "; ".join(lost))


def _rest(folder: Path, truth: Truth) -> list[str]:
    """What is wrong with the resumed run."""
    ended = run_to_end(Plan(resumed(worker_run(folder / "run")), folder / "notes-resumed"))
    wrong = wrong_states(ended.notes, truth, "began") + wrong_states(ended.notes, truth, "ended")
    return wrong if ended.step("ended") == STEPS else [*wrong, f"no resume: {ended.output.strip()[-300:]}"]
