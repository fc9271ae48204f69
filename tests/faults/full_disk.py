"""No space left: at each kind of operation of each writer once, and on a real small disk where mounting is permitted."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from faults.checkpoints import wrong_checkpoints
from faults.child import Full, Plan
from faults.tiny import Ended, Outcome, Truth, resumed, run_to_end, small_run, truth_of, wrong_states

STEPS = 12
FOREVER = 10**9
# What a run cannot do without; it goes on without the others.
NEEDED = re.compile(r"\w+ (\.|checkpoints.*|\.?run\.(json|lock).*)")


def tries(rng: np.random.Generator, workspace: Path, count: int) -> Iterator[Outcome]:
    """Every writer in turn, and every fifth time a small disk."""
    writers: dict[str, list[tuple[str, list[int]]]] = {}
    for number in range(count):
        name = "1 process async" if number % 2 else "1 process"
        truth = truth_of(workspace, disk_run(Path("unused"), name), fault=Full(0, 0, workspace / "none"))
        if number % 5 == 4:
            yield small_disk(rng, workspace / f"disk-{number}", name, truth)
            continue
        kinds = writers.setdefault(name, kinds_of(truth))
        kind, numbers = kinds[number // 2 % len(kinds)]
        full = Full(int(rng.choice(numbers)), int(rng.choice([1, 2, 5, FOREVER])), workspace / f"refused-{number}")
        yield refuse(workspace / f"refuse-{number}", name, truth, full, kind)


def disk_run(folder: Path, name: str):
    """A short run with every file that a run may write."""
    return small_run(folder, name, steps=STEPS, output={"evaluate_every": 6})


def kinds_of(truth: Truth) -> list[tuple[str, list[int]]]:
    """The operations of a run by what they do, and their numbers."""
    path = truth.folder.parent / "notes" / "operations.txt"
    kinds: dict[str, list[int]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        kinds.setdefault(re.sub(r"\d+", "N", line), []).append(number)
    return sorted(kinds.items())


def refuse(folder: Path, name: str, truth: Truth, full: Full, kind: str) -> Outcome:
    """A run in which an operation fails, then room is made, and it is resumed."""
    ended = run_to_end(Plan(disk_run(folder / "run", name), folder / "notes", full))
    all_refused = full.found.read_text().splitlines() if full.found.exists() else []
    refused = next(iter(all_refused), "")
    needed = full.count == FOREVER or any(NEEDED.fullmatch(operation) for operation in all_refused)
    lost = wrong_end(ended, truth, folder / "run", needed) if refused else ["the operation did not happen"]
    lost += wrong_resume(folder, name, truth) if ended.step("ended") != STEPS or lost else []
    if not lost:
        shutil.rmtree(folder)
    times = "for good" if full.count == FOREVER else f"{full.count} times"
    return Outcome(f"{name}: no space {times} at {refused or kind}", how_it_ended(ended), "; ".join(lost))


def small_disk(rng: np.random.Generator, folder: Path, name: str, truth: Truth) -> Outcome:
    """A disk of random size, which is made larger for the resume."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    kilobytes = int(rng.integers(100, 3000))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True)
    what = f"{name}: a disk of {kilobytes} KiB"
    if mounted.returncode:
        return Outcome(what, skipped=f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        run = disk_run(disk / "run", name)
        ended = run_to_end(Plan(run, folder / "notes"))
        lost = wrong_end(ended, truth, disk / "run", needed=True, said=ended.step("ended") != STEPS)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        if ended.step("ended") != STEPS:
            lost += wrong_resume(folder, name, truth, disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)
    if not lost:
        shutil.rmtree(folder)
    return Outcome(what, how_it_ended(ended), "; ".join(lost))


def how_it_ended(ended: Ended) -> str:
    return "went on" if ended.step("ended") == STEPS else "ended by an error"


def wrong_end(ended: Ended, truth: Truth, run_folder: Path, needed: bool, said: bool = True) -> list[str]:
    """What is wrong with how a run takes a full disk. needed: it may end; said: it must say so."""
    wrong = [] if ended.in_time else ["hangs"]
    if "Traceback" in ended.output:
        wrong.append(f"traceback: {ended.output.strip().splitlines()[-1][:160]}")
    if said and "no space left" not in ended.output.lower():
        wrong.append("no sentence says so")
    if ended.step("ended") != STEPS:
        wrong += [] if needed else ["ended, though only a report could not be written"]
        wrong += [] if ended.code else ["ended early with exit code 0"]
    wrong += wrong_states(ended.notes, truth, "ended")
    if (run_folder / "checkpoints").exists():
        wrong += wrong_checkpoints(run_folder, truth)
    complete = [line["step"] for line in ended.notes if line["event"] == "complete"]
    if complete and not (run_folder / "checkpoints" / f"step-{complete[-1]:08d}").exists():
        wrong.append(f"the complete checkpoint of step {complete[-1]} is gone")
    return wrong


def wrong_resume(folder: Path, name: str, truth: Truth, run_folder: Path | None = None) -> list[str]:
    """What is wrong with the rest of the run, with room on the disk."""
    run = resumed(disk_run(run_folder or folder / "run", name))
    ended = run_to_end(Plan(run, folder / "notes-resumed"))
    wrong = wrong_states(ended.notes, truth, "began") + wrong_states(ended.notes, truth, "ended")
    return wrong if ended.step("ended") == STEPS else [*wrong, f"no resume: {ended.output.strip()[-200:]}"]
