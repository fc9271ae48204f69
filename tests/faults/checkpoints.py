"""What can be asked about the checkpoints of a folder, without the trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from faults.tiny import Truth, steps_in
from safetensors.torch import load_file

try:
    from patchlight.checkpoint.folder import verify
except ImportError:
    def verify(path):
        return [] if (path / "facts.json").exists() and (path/".metadata").exists() else [f"{path} incomplete"]


def wrong_checkpoints(run_folder: Path, truth: Truth) -> list[str]:
    """Sentences about checkpoints that have a final name, but are damaged or hold other weights than they should."""
    wrong = []
    for step in steps_in(run_folder):
        path = run_folder / "checkpoints" / f"step-{step:08d}"
        wrong += verify(path)
        if not wrong and truth.step_folder(step).exists():
            wrong += [f"{path.name}/{name} has other tensors" for name in different_files(path, truth.step_folder(step))]
    return wrong


def different_files(a: Path, b: Path) -> list[str]:
    """Files of tensors that are not equal in two checkpoints."""
    names = {path.name for folder in (a, b) for path in folder.glob("*.safetensors")}
    return sorted(name for name in names if not _equal(a / name, b / name))


def _equal(a: Path, b: Path) -> bool:
    if not (a.exists() and b.exists()):
        return False
    tensors, others = load_file(a), load_file(b)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
