"""What can be asked about the checkpoints of a folder, without the trainer."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from faults.tiny import Truth, steps_in
from safetensors.torch import load_file

from patchlight.checkpoint import folder


class HangsError(BaseException):
    """Something waits for ever. Not an Exception, which a reader may take for damage."""


@contextmanager
def in_time(seconds: int = 20) -> Iterator[None]:
    """Raises HangsError in a block that takes longer."""

    def too_late(*_: object) -> None:
        raise HangsError(f"no end in {seconds} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verify(path: Path) -> list[str]:
    """`patchlight.checkpoint.folder.verify`, which must not wait for ever."""
    with in_time():
        return folder.verify(path)


def wrong_checkpoints(run_folder: Path, truth: Truth) -> list[str]:
    """Sentences about checkpoints that have a final name, but are damaged or hold other weights than they should."""
    wrong = []
    for step in steps_in(run_folder):
        path = run_folder / "checkpoints" / f"step-{step:08d}"
        damage = verify(path)
        wrong += damage
        if not damage and truth.step_folder(step).exists():
            wrong += [f"{path.name}/{name} has other tensors" for name in different(path, truth.step_folder(step))]
    return wrong


def different(a: Path, b: Path) -> list[str]:
    """Files of tensors that are not equal in two checkpoints."""
    names = {path.name for place in (a, b) for path in place.glob("*.safetensors")}
    return sorted(name for name in names if not _equal(a / name, b / name))


def _equal(a: Path, b: Path) -> bool:
    if not (a.exists() and b.exists()):
        return False
    tensors, others = load_file(a), load_file(b)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
