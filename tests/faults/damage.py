"""Damaged checkpoints: a resume must take the newest whole one, name what is damaged, and load no wrong bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from faults.checkpoints import HangsError, verify
from faults.child import Plan
from faults.tiny import Outcome, Truth, resumed, run_to_end, small_run, truth_of

STEPS_KEPT = (24, 27, 30)


def tries(rng: np.random.Generator, workspace: Path, count: int) -> Iterator[Outcome]:
    """A damage after the other; a fifth of them in a checkpoint of two shards."""
    for number in range(count):
        name = "2 shards" if number % 5 == 4 else "1 process"
        truth = truth_of(workspace, small_run(Path("unused"), name, steps=32), 2 if name == "2 shards" else 1)
        yield _try(rng, workspace / f"damage-{number}", name, truth, number)


def _try(rng: np.random.Generator, folder: Path, name: str, truth: Truth, number: int) -> Outcome:
    run_folder = folder / "run"
    copy_run(truth, run_folder)
    damaged_steps = STEPS_KEPT if number % 20 == 19 else STEPS_KEPT[1:] if number % 7 == 6 else STEPS_KEPT[2:]
    kinds = list(DAMAGES)
    what, files = [], {}
    for step in damaged_steps:
        path = run_folder / "checkpoints" / f"step-{step:08d}"
        kind = kinds[number % len(kinds)]
        file = files[step] = DAMAGES[kind](rng, path)
        what.append(f"{kind} of {path.name}/{file}" if file else kind)
    broken = {step for step, file in files.items() if file}
    lost = unseen(run_folder, broken)
    whole = max((step for step in STEPS_KEPT if step not in broken), default=None)
    run = resumed(small_run(run_folder, name, steps=32))
    ended = run_to_end(Plan(run, folder / "notes", only_begin=True), truth.processes)
    lost += wrong_resume(ended, truth, whole)
    names = [file.split("/")[0] for step, file in files.items() if file]
    lost += [f"no sentence names {file}" for file in names if file not in ended.output.replace("\n", "")]
    damaged = [f"step-{step:08d}.damaged" for step in broken if whole is not None]
    lost += [f"there is no {name}" for name in damaged if not (run_folder / "checkpoints" / name).exists()]
    if not lost:
        shutil.rmtree(folder)
    return Outcome(f"{name}: {'; '.join(what)}", f"resumed at {ended.step('began')}", "; ".join(lost))


def copy_run(truth: Truth, folder: Path) -> None:
    """A run's folder with three checkpoints."""
    folder.mkdir(parents=True)
    shutil.copy(truth.folder / "run.json", folder)
    for step in STEPS_KEPT:
        shutil.copytree(truth.step_folder(step), folder / "checkpoints" / f"step-{step:08d}")


def unseen(run_folder: Path, broken: set[int]) -> list[str]:
    """Where `verify` is wrong: damage that it does not see, or sees where there is none."""
    wrong = []
    for step in STEPS_KEPT:
        try:
            found = verify(run_folder / "checkpoints" / f"step-{step:08d}")
        except (Exception, HangsError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
            continue
        if bool(found) != (step in broken):
            wrong.append(f"verify says {found} of step {step}")
    return wrong


def wrong_resume(ended, truth: Truth, whole: int | None) -> list[str]:
    """What is wrong with a resume that should have begun at the checkpoint of a step, or refused to begin."""
    wrong = [] if ended.in_time else ["hangs"]
    if "Traceback" in ended.output:
        wrong.append(f"traceback: {ended.output.strip().splitlines()[-1][:200]}")
    begun = [line for line in ended.notes if line["event"] == "began"]
    wrong += [f"began at step {line['step']}, not at {whole}" for line in begun if line["step"] != whole][:1]
    states = [truth.states[line["step"]].get(line["rank"]) == line["fingerprint"] for line in begun]
    wrong += ["loaded wrong bytes"] if not all(states) else []
    if whole is None:
        wrong += (
            []
            if ended.code and "as it was written; " in ended.output
            else ["no error sentence, though no checkpoint is whole"]
        )
    elif not begun:
        wrong.append(f"did not resume: {ended.output.strip()[-200:]}")
    return wrong


# Each returns the name of the file that it damaged; "" if the checkpoint is still whole.


def _file(rng: np.random.Generator, path: Path, least: int = 0) -> Path:
    files = sorted(file for file in path.iterdir() if file.is_file() and file.stat().st_size >= least)
    return files[rng.integers(len(files))]


def truncate(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path, 1)
    os.truncate(file, int(rng.integers(file.stat().st_size)))
    return file.name


def zero_block(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path, 1)
    data = bytearray(file.read_bytes())
    first = int(rng.integers(-(-len(data) // 4096))) * 4096
    if not any(data[first : first + 4096]):
        first = 0
    data[first : first + 4096] = bytes(len(data[first : first + 4096]))
    file.write_bytes(data)
    return file.name


def flip_bit(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path, 1)
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    return file.name


def empty(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path)
    file.write_bytes(b"")
    return file.name


def delete(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path)
    file.unlink()
    return file.name


def swap_in_older(rng: np.random.Generator, path: Path) -> str:
    others = sorted(other for other in path.parent.glob("step-????????") if other.name != path.name)
    pairs = [(file, other / file.name) for file in sorted(path.iterdir()) for other in others]
    # Others may be damaged already: what is no file there cannot be swapped in, and reading a pipe would not end.
    pairs = [(file, old) for file, old in pairs if file.is_file() and old.is_file()]
    different = [(file, old) for file, old in pairs if file.read_bytes() != old.read_bytes()]
    if not different:
        return append(rng, path)
    file, old = different[rng.integers(len(different))]
    shutil.copy(old, file)
    return file.name


def append(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path)
    with file.open("ab") as opened:
        opened.write(rng.bytes(int(rng.integers(1, 5000))))
    return file.name


def edit_facts(rng: np.random.Generator, path: Path) -> str:
    if not (path / "facts.json").is_file():  # by an earlier damage; reading a pipe would not end
        return append(rng, path)
    facts = json.loads((path / "facts.json").read_text())
    if rng.random() < 0.5:
        facts["clock"]["step"] = -5
    else:
        facts["loader"]["samples"] = facts["loader"]["samples"] + 4
    (path / "facts.json").write_text(json.dumps(facts, indent=1))
    return "facts.json"


def directory_in_its_place(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path)
    file.unlink()
    file.mkdir()
    (file / "inside").write_text("")
    return file.name


def pipe_in_its_place(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path)
    file.unlink()
    os.mkfifo(file)
    return file.name


def link_to_itself(rng: np.random.Generator, path: Path) -> str:
    file = _file(rng, path)
    file.unlink()
    file.symlink_to(file)
    return file.name


def stray_names(rng: np.random.Generator, path: Path) -> str:
    """Beside the checkpoints; they are ignored."""
    beside = path.parent
    (beside / "step-00000099.bak").mkdir(exist_ok=True)
    (beside / "step-00000007.txt").write_text("7")
    (beside / "step-abc").mkdir(exist_ok=True)
    (beside / "step-99").mkdir(exist_ok=True)
    (beside / "step-00000098.damaged").mkdir(exist_ok=True)
    (beside / ".step-00000097").mkdir(exist_ok=True)
    for name, target in (("loop", "loop"), ("step-loop", "step-loop"), ("step-00000096.link", ".")):
        if not (beside / name).is_symlink():
            (beside / name).symlink_to(target)
    return ""


DAMAGES: dict[str, Callable[[np.random.Generator, Path], str]] = {
    "truncation": truncate,
    "zeroed block": zero_block,
    "flipped bit": flip_bit,
    "emptying": empty,
    "deletion": delete,
    "older file in place": swap_in_older,
    "appended bytes": append,
    "edited facts": edit_facts,
    "directory in place": directory_in_its_place,
    "pipe in place": pipe_in_its_place,
    "link to itself in place": link_to_itself,
    "stray names": stray_names,
}
