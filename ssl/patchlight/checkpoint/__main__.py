"""`python -m patchlight.checkpoint PATH`: reads every byte of the checkpoints of a run, and says which are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ..checks import sentence
from .folder import complete, verify
from .manifest import MANIFEST, Manifest


def check_checkpoint(path: Annotated[Path, tyro.conf.Positional]) -> None:
    """Reads every byte of a checkpoint, or of all checkpoints of a run, and says which are as they were written.

    Ends with an error if one is not.

    Args:
        path: a run's folder, its folder of checkpoints, or one checkpoint.
    """
    checkpoints = checkpoints_at(path)
    damaged = 0
    for checkpoint in checkpoints:
        wrong = verify(checkpoint)
        damaged += bool(wrong)
        if wrong:
            print(*(f"{checkpoint.name}: {line}" for line in wrong), sep="\n")
            continue
        manifest = Manifest.read(checkpoint)
        size = sum(piece.length for pieces in manifest.files.values() for piece in pieces)
        print(f"{checkpoint.name}: whole, {len(manifest.files)} files, {len(manifest.tensors)} tensors, {size:,} bytes")
    if damaged:
        raise SystemExit(f"{damaged} of {len(checkpoints)} checkpoints are damaged.")


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints that a path stands for, oldest first; a SystemExit if there are none."""
    if (path / MANIFEST).exists():
        return [path]
    found = complete(path / "checkpoints") or complete(path)
    if not found and path.name.startswith("step-") and path.is_dir():
        return [path]  # without a manifest
    if not found:
        rule, got = "check-checkpoint needs a run's folder or a checkpoint", f"{path}, which holds none"
        raise SystemExit(sentence(rule, got, "pass the folder that Output.folder named"))
    return found


if __name__ == "__main__":
    tyro.cli(check_checkpoint)
