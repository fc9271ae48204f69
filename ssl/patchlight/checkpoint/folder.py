"""A folder of checkpoints: step-<n>/ each. Nothing else counts, and none counts before it is whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..durable import move, sync_folder
from .manifest import MANIFEST, DamagedError, Manifest, StoredTensor, damaged, find_damage, pieces_of
from .tensors import TensorReader, Tensors, write_tensors

FACTS = "facts.json"  # clock, run, loader position: also for people to read
FACT_KINDS = {"clock": dict, "run": dict, "loader": dict, "processes": int}
TEACHER = "teacher.safetensors"  # the backbone under timm's names
_NAME = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def complete(folder: Path) -> list[Path]:
    """Checkpoints that were completed, oldest first, whether or not they have been damaged since."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def verify(path: Path, contents: bool = True, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, a sentence each; empty if it is whole.

    contents=False compares sizes alone. part, parts: looks at every parts-th file, as several processes share the work.
    """
    try:
        manifest = Manifest.read(path)
    except DamagedError as error:
        return [str(error)]
    if path.name != name_of(manifest.step) and _NAME.fullmatch(path.name):
        return [str(damaged(path, f"the {MANIFEST} of step {manifest.step}"))]
    found = find_damage(path, manifest, sorted(manifest.files)[part::parts], contents)
    return [str(damaged(path, wrong)) for wrong in found]


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it no longer counts; nothing is deleted. Returns its new place."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in range(10**6))
    new = next(name for name in names if not name.exists())
    move(path, new)
    return new


def write_rest(partial: Path, step: int, facts: Mapping, teacher: Mapping[str, Tensor], tensors: Tensors) -> None:
    """Adds the facts, the teacher and, last, the manifest to a checkpoint whose tensors are written."""
    with pieces_of(partial / FACTS) as file:
        file.write(json.dumps(facts, indent=1).encode())
    rest = {FACTS: tuple(file.pieces), TEACHER: write_tensors(partial / TEACHER, teacher)}
    Manifest(step, tensors.files | rest, tensors.stored).write(partial)
    sync_folder(partial)


def publish(partial: Path, path: Path) -> None:
    """Gives a complete checkpoint its final name."""
    if path.exists():
        delete(path)  # only if the same step is saved twice
    move(partial, path)


def delete(path: Path) -> None:
    """Deletes a checkpoint; a kill in between leaves none that looks complete."""
    doomed = path.with_name(f"{path.name}.deleted.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    move(path, doomed)
    shutil.rmtree(doomed)


def delete_old(folder: Path, keep: int, also: int | None = None) -> None:
    """Deletes the oldest checkpoints, so that `keep` remain that have all their files. also: a step that is kept too."""
    whole = [path for path in complete(folder) if not verify(path, contents=False)]
    for path in whole[:-keep]:
        if also is None or path.name != name_of(also):
            delete(path)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint; raises DamagedError if they are not those that were written."""
    manifest = Manifest.read(path)
    wrong = find_damage(path, manifest, [FACTS]) if FACTS in manifest.files else [f"no {FACTS}"]
    if wrong:
        raise damaged(path, wrong[0])
    try:
        facts = json.loads((path / FACTS).read_bytes())
        if all(isinstance(facts[name], kind) for name, kind in FACT_KINDS.items()):
            return facts
        reason = "facts of other kinds"
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise damaged(path, f"a {FACTS} that no run has written ({reason})")


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, by flattened name."""
    return Manifest.read(path).tensors


def load_tensors(path: Path, state: dict[str, Any], alone: bool = True) -> None:
    """Reads into the tensors of `state`, which any number of processes may have written. alone: for this process."""
    reader = TensorReader(path, Manifest.read(path))
    try:
        dcp.load(state, storage_reader=reader, no_dist=alone)
    except CheckpointException as problem:  # not an Exception, and its text is a traceback per process
        raise next(iter(problem.failures.values()))[0] from problem
