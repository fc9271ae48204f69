"""Checkpoints that somebody made to do harm: nothing in them is executed, or reaches other files, or takes all memory."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from faults.checkpoints import verify
from faults.child import Plan
from faults.damage import copy_run
from faults.launcher import PATIENCE
from faults.tiny import Outcome, resumed, run_to_end, small_run, truth_of

NEWEST = "step-00000030"
MOST_MEMORY = 2 << 30  # bytes that reading a checkpoint of one megabyte may add


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def tries(rng: np.random.Generator, workspace: Path, count: int) -> Iterator[Outcome]:
    """A crafted file after the other, read by a resume, by the evaluation and by check-checkpoint."""
    for number in range(count):
        truth = truth_of(workspace, small_run(Path("unused"), steps=32))
        folder = workspace / f"pickles-{number}"
        run_folder, canary = folder / "run", folder / "canary"
        copy_run(truth, run_folder)
        path = run_folder / "checkpoints" / NEWEST
        kind = list(CRAFTS)[number % len(CRAFTS)]
        what = CRAFTS[kind](rng, path, canary)
        shutil.copytree(run_folder, folder / "copy")
        ended = run_to_end(Plan(resumed(small_run(run_folder, steps=32)), folder / "notes", only_begin=True))
        states = [line for line in ended.notes if line["event"] == "began"]
        lost = ["a resume executed it"] if canary.exists() else []
        lost += ["a resume hangs"] if not ended.in_time else []
        # With right checksums it is no damage: an error of any kind will do.
        sealed = (path / "manifest.json").exists() and not verify(path)
        lost += ["a traceback"] if "Traceback" in ended.output and not sealed else []
        lost += ["no error"] if not states and not ended.code else []
        lost += (
            ["loaded wrong bytes"] if any(truth.states[s["step"]].get(0) != s["fingerprint"] for s in states) else []
        )
        lost += read_elsewhere(folder / "copy", canary)
        if not lost:
            shutil.rmtree(folder)
        result = (
            f"resumed at {ended.step('began')}" if states else f"refused: {ended.output.strip().splitlines()[-1][:100]}"
        )
        yield Outcome(f"{kind} {what}", result, "; ".join(lost))


def read_elsewhere(run_folder: Path, canary: Path) -> list[str]:
    """What is wrong with how other readers take it."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(run_folder, sender))
    process.start()
    sender.close()
    try:
        wrong = receiver.recv() if receiver.poll(PATIENCE) else ["a reader hangs"]
    except EOFError:
        wrong = ["a reader died"]
    process.kill()
    process.join()
    return wrong + (["a reader executed it"] if canary.exists() else [])


def _read(run_folder: Path, sender) -> None:
    from patchlight.checkpoint.__main__ import check_checkpoint
    from patchlight.evaluation.checkpoints import open_checkpoint

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))
    wrong = []
    checkpoint = run_folder / "checkpoints" / NEWEST
    for name, reads in {
        "check_checkpoint": lambda: check_checkpoint(run_folder),
        "open_checkpoint": lambda: open_checkpoint(str(checkpoint)),
        "open_checkpoint of the teacher": lambda: open_checkpoint(str(checkpoint / "teacher.safetensors")),
    }.items():
        try:
            reads()
        except MemoryError:
            wrong.append(f"{name} takes all memory")
        except (Exception, SystemExit):
            pass  # it is refused
    sender.send(wrong)


def seal(path: Path, **changes) -> None:
    """Writes the manifest anew, as somebody would who knows the format: with the right checksums."""
    from patchlight.checkpoint import manifest as format_of

    whole = json.loads((path / "manifest.json").read_text())
    content = whole["content"]
    for name in content["files"]:
        if (path / name).is_file() and name not in changes:
            data = (path / name).read_bytes()
            pieces = content["files"][name]
            if sum(length for _, length, _ in pieces) != len(data):
                content["files"][name] = [[0, len(data), format_of.checksum(data)]]
            else:
                content["files"][name] = [[b, n, format_of.checksum(data[b : b + n])] for b, n, _ in pieces]
    for name, value in changes.items():
        content[name] = value
    whole["checksum"] = format_of.checksum(format_of._canonical(content))
    (path / "manifest.json").write_text(json.dumps(whole))


# Each returns a word about what it did.


def pickle_as_any_file(rng: np.random.Generator, path: Path, canary: Path) -> str:
    """In place of a file, as a bare pickle or as torch.save writes it."""
    names = [".metadata", "facts.json", "rank-0000.safetensors", "teacher.safetensors", "manifest.json", "__0_0.distcp"]
    name = names[rng.integers(len(names))]
    if rng.random() < 0.5:
        (path / name).write_bytes(pickle.dumps(Harm(canary)))
    else:
        saved = io.BytesIO()  # torch.save refuses the name .metadata
        torch.save({"weights": Harm(canary)}, saved)
        (path / name).write_bytes(saved.getvalue())
    if name in ("facts.json", "rank-0000.safetensors", "teacher.safetensors") and rng.random() < 0.7:
        seal(path)
        return f"{name}, with its checksum"
    return name


def format_of_before(rng: np.random.Generator, path: Path, canary: Path) -> str:
    """A checkpoint as torch.distributed.checkpoint would write it, whose metadata is a pickle."""
    facts = (path / "facts.json").read_bytes()
    shutil.rmtree(path)
    path.mkdir()
    (path / "facts.json").write_bytes(facts)
    (path / ".metadata").write_bytes(pickle.dumps(Harm(canary)))
    (path / "__0_0.distcp").write_bytes(pickle.dumps(Harm(canary)))
    return ""


def path_out_of_the_checkpoint(rng: np.random.Generator, path: Path, canary: Path) -> str:
    """A manifest whose file is another one."""
    whole = json.loads((path / "manifest.json").read_text())["content"]
    other = ["../step-00000027/rank-0000.safetensors", str(path.parent / "step-00000027/rank-0000.safetensors"), ".."]
    name = other[rng.integers(len(other))]
    files = dict(whole["files"])
    files[name] = files.pop("rank-0000.safetensors")
    tensors = {n: [d, s, [[o, z, name, p] for o, z, _, p in chunks]] for n, (d, s, chunks) in whole["tensors"].items()}
    seal(path, files=files, tensors=tensors)
    return name


def huge_numbers(rng: np.random.Generator, path: Path, canary: Path) -> str:
    """Lengths and shapes that no memory holds."""
    whole = json.loads((path / "manifest.json").read_text())["content"]
    kind = str(rng.choice(["length", "shape", "header", "negative"]))
    files, tensors = dict(whole["files"]), dict(whole["tensors"])
    if kind == "length":
        files["rank-0000.safetensors"] = [[0, 1 << 50, "0" * 16]]
    elif kind == "negative":
        files["rank-0000.safetensors"] = [[-5, -(1 << 40), "0" * 16]]
    elif kind == "shape":
        name = sorted(tensors)[rng.integers(len(tensors))]
        dtype, shape, chunks = tensors[name]
        tensors[name] = [dtype, [1 << 40] * max(1, len(shape)), chunks]
    else:
        data = bytearray((path / "teacher.safetensors").read_bytes())
        data[:8] = (1 << 60).to_bytes(8, "little")
        (path / "teacher.safetensors").write_bytes(data)
    seal(path, files=files, tensors=tensors) if kind != "header" else seal(path)
    return kind


def nested_json(rng: np.random.Generator, path: Path, canary: Path) -> str:
    """JSON that is deeper than any stack."""
    name = str(rng.choice(["facts.json", "manifest.json"]))
    (path / name).write_text("[" * 200_000)
    if name == "facts.json":
        seal(path)
    return name


def other_json(rng: np.random.Generator, path: Path, canary: Path) -> str:
    """Valid JSON of another kind, with its checksum."""
    value = [None, [], 5, {"clock": {}}, {"clock": {"step": "x"}, "run": [], "loader": 3}][rng.integers(5)]
    (path / "facts.json").write_text(json.dumps(value))
    seal(path)
    return f"{value!r} as facts"


CRAFTS = {
    "a pickle as": pickle_as_any_file,
    "a checkpoint of pickles": format_of_before,
    "a path out of the checkpoint:": path_out_of_the_checkpoint,
    "huge": huge_numbers,
    "deep": nested_json,
    "other": other_json,
}
