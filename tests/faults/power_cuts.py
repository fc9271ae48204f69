"""Power cuts: runs are recorded once, and cut at any operation; a resume must find what was reported complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from faults.child import Plan, Recorded
from faults.power import Disk, differences, read_record, write_tree
from faults.tiny import (
    CONFIGURATIONS,
    Ended,
    Outcome,
    Truth,
    lines_of,
    resumed,
    run_to_end,
    small_run,
    truth_of,
    wrong_states,
)

STEPS = 24
NAMES = ("1 process", "2 shards async", "1 process async", "2 shards")
_records: dict[tuple[Path, str], list] = {}


def tries(rng: np.random.Generator, workspace: Path, count: int) -> Iterator[Outcome]:
    """Cuts of four configurations in turn."""
    for number in range(count):
        name = NAMES[number % len(NAMES)]
        truth = truth_of(workspace, small_run(Path("unused"), name, steps=STEPS), CONFIGURATIONS[name][0])
        if (workspace, name) not in _records:
            record, unseen = record_run(name, workspace / f"recorded-{name.replace(' ', '-')}", truth)
            _records[workspace, name] = record
            if unseen:
                yield Outcome(f"{name}: record", lost=f"written unseen, so without a known fsync: {unseen}")
        yield cut(rng, workspace / f"cut-{number}", name, truth, _records[workspace, name])


def record_run(name: str, folder: Path, truth: Truth) -> tuple[list, list[str]]:
    """All operations of a run, and the files below checkpoints/ that something else wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    run = small_run(folder / "run", name, steps=STEPS)
    ended = run_to_end(Plan(run, folder / "notes", Recorded(folder / "operations")), truth.processes)
    assert ended.code == 0, ended.output[-2000:]
    record, disk = read_record(folder / "operations"), Disk()
    for operation in record:
        if not isinstance(operation, tuple):
            disk.apply(operation)
    unseen = differences(disk.without_cut(), folder / "run")
    return record, sorted({Path(path).name for path in unseen if "checkpoints" in path})


def cut(rng: np.random.Generator, folder: Path, name: str, truth: Truth, record: list) -> Outcome:
    """Leaves what a disk may hold when the power ends at a random operation, and resumes."""
    # Most cuts fall where something could be lost.
    moments = [n for n, part in enumerate(record, 1) if isinstance(part, tuple) or part.path.startswith("checkpoints")]
    moment = int(rng.choice(moments) if rng.random() < 0.8 else rng.integers(1, len(record)))
    disk, reported = Disk(), 0
    for operation in record[:moment]:
        if isinstance(operation, tuple):
            reported = operation[1]
        else:
            disk.apply(operation)
    write_tree(disk.after_cut(rng), folder / "run")
    run = resumed(small_run(folder / "run", name, steps=STEPS))
    ended = run_to_end(Plan(run, folder / "notes"), truth.processes)
    lost = wrong_after_cut(ended, truth, folder / "run", reported)
    if not lost:
        shutil.rmtree(folder)
    last = record[moment - 1]
    where = "a report" if isinstance(last, tuple) else f"{last.name} {last.path}"
    return Outcome(
        f"{name}: cut after {where}", f"{reported} was complete, began at {ended.step('began')}", "; ".join(lost)
    )


def wrong_after_cut(ended: Ended, truth: Truth, run_folder: Path, reported: int) -> list[str]:
    """What is wrong with a resume after a power cut."""
    if not ended.in_time:
        return ["hangs"]
    if "Traceback" in ended.output:
        return [f"traceback: {ended.output.strip().splitlines()[-1][:200]}"]
    if ended.step("ended") is None:
        return [] if not reported and "train.py:" in ended.output else [f"did not end: {ended.output[-300:]}"]
    wrong = wrong_states(ended.notes, truth, "began") + wrong_states(ended.notes, truth, "ended")
    if (ended.step("began") or 0) < reported:
        wrong.append(f"began at step {ended.step('began')}, though the checkpoint of step {reported} was complete")
    if ended.step("ended") == STEPS and (extra := set(lines_of(run_folder)) - set(lines_of(truth.folder))):
        wrong.append(f"metrics.jsonl has wrong lines: {sorted(extra)[:2]}")
    return wrong
