"""`python -m patchlight.checkpoint PATH`: reads every byte of the checkpoints of a run, and says which are whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from ..checks import check, sentence
from ..usage import POSITIONAL, call
from .folder import complete, verify
from .manifest import MANIFEST, Manifest


def check_checkpoint(path: Annotated[Path, POSITIONAL]) -> None:
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
    got, remedy = f"{damaged} of {len(checkpoints)} damaged", "a run resumes from the newest whole one"
    check(not damaged, "All checkpoints must be as they were written", got, remedy)


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints that a path stands for, oldest first; an error if there are none."""
    if (path / MANIFEST).exists():
        return [path]
    found = complete(path / "checkpoints") or complete(path)
    if not found and path.name.startswith("step-") and path.is_dir():
        return [path]  # without a manifest
    if not found:
        rule, got = "check-checkpoint needs a run's folder or a checkpoint", f"{path}, which holds none"
        raise FileNotFoundError(sentence(rule, got, "pass the folder that --output.folder named"))
    return found


def main(arguments: Sequence[str] | None = None, prog: str = "python -m patchlight.checkpoint") -> None:
    call(check_checkpoint, sys.argv[1:] if arguments is None else arguments, prog)


if __name__ == "__main__":
    main()
