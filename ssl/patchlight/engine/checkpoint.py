"""Checkpoints: sharded, with their final name only when complete, and loadable on any number of ranks."""

from __future__ import annotations

import json
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from .branches import Branch
from .parallel import Mesh

FACTS = "facts.json"  # clock, run, loader position: also for people to read
EXPORT = "teacher.safetensors"
REFUSED_DIFFERENCES = ("model.", "objectives.", "optim.name")  # a checkpoint that differs in these is refused


class Checkpoints:
    """The checkpoints of one folder: step-<n>/ each, written as step-<n>.partial/ and renamed when complete."""

    def __init__(self, folder: Path, mesh: Mesh, keep: int, asynchronous: bool = False) -> None:
        self.folder, self.mesh, self.keep, self.asynchronous = Path(folder), mesh, keep, asynchronous
        self.under_way: tuple[Future, Path, dict, dict] | None = None
        # A save beside the training has a process group of its own: its messages must not mix with those of training.
        self.group: Any = dist.new_group(backend="gloo") if asynchronous and mesh.world > 1 else None

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")

    def latest(self) -> Path | None:
        """The newest checkpoint. Ranks wait for each other first, so that all find the same."""
        self.mesh.barrier()
        found = self.all()
        return found[-1] if found else None

    def save(self, step: int, state: dict[str, Any], facts: dict, export: dict[str, Tensor]) -> Path:
        """Saves from all ranks: `state` of tensors, `facts` that fit JSON, and `export` as one safetensors file."""
        self.finish()
        path = self.folder / f"step-{step:08d}"
        partial = path.with_suffix(".partial")
        if self.mesh.rank == 0:
            for left_over in self.folder.glob("*.partial"):
                shutil.rmtree(left_over)
            partial.mkdir(parents=True)
        self.mesh.barrier()
        alone = self.mesh.world == 1
        if self.asynchronous:
            save = dcp.async_save(state, checkpoint_id=partial, process_group=self.group, no_dist=alone)
            future = cast("Future", save)  # the only result with these arguments
            self.under_way = (future, path, facts, export)
            return path
        with _quiet():
            self._attempt(path, lambda: dcp.save(state, checkpoint_id=partial, no_dist=alone))
        self._attempt(path, lambda: self._complete(path, facts, export))
        return path

    def finish(self, wait: bool = True) -> None:
        """Completes a save that is under way; wait=False does so only if it is written on all ranks."""
        if self.under_way is None:
            return
        if wait or not self.mesh.any(not self.under_way[0].done()):
            (future, path, facts, export), self.under_way = self.under_way, None
            self._attempt(path, future.result)
            self._attempt(path, lambda: self._complete(path, facts, export))

    def _attempt(self, path: Path, work: Callable[[], Any]) -> None:
        """Does a part of a save on every rank; if it fails on any, all raise, and the partial checkpoint is deleted."""
        error = None
        try:
            work()
        except CheckpointException as problem:  # not an Exception, and its text is a traceback per rank
            error = next(iter(problem.failures.values()))[0]
        except Exception as problem:
            error = problem
        if not self.mesh.any(error is not None):
            return
        if self.mesh.rank == 0:
            shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)
        intact = self.all()
        raise OSError(
            f"Checkpoint {path} could not be written, got {error or 'an error on another rank'}; make room or choose "
            f"another folder, then resume from {intact[-1] if intact else 'the start: there is no earlier one'}."
        ) from error

    def _complete(self, path: Path, facts: dict, export: dict[str, Tensor]) -> None:
        """On rank 0: adds the files that are not sharded, renames the folder, and deletes the oldest checkpoints."""
        if self.mesh.rank != 0:
            return
        partial = path.with_suffix(".partial")
        save_file(export, partial / EXPORT)
        (partial / FACTS).write_text(json.dumps(facts, indent=1))
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)


def read_facts(path: Path) -> dict:
    return json.loads((path / FACTS).read_text())


def check_same_run(saved: dict, now: dict, path: Path) -> None:
    """Refuses a checkpoint of another model, objective or optimizer; accepts other differences with a warning."""
    differences = _differences(saved, now)
    refused = [line for line in differences if line.startswith(REFUSED_DIFFERENCES)]
    if refused:
        raise ValueError(
            f"A run resumes from its own checkpoints, got {path} with {'; '.join(refused)}; "
            "restore these settings or choose another Output.folder."
        )
    differences = [line for line in differences if not line.startswith("output.")]
    if differences:
        warnings.warn(f"Resuming with settings that differ from the checkpoint: {'; '.join(differences)}.")


def _differences(saved: Any, now: Any, where: str = "") -> list[str]:
    """Sentences about what differs between two trees of plain values."""
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return [] if saved == now else [f"{where} was {saved!r} and is {now!r}"]
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        lines += _differences(saved.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    return lines


def stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint, by flattened name."""
    found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def check_fits(modules: dict[str, nn.Module], stored: dict[str, TensorStorageMetadata], path: Path) -> None:
    """Raises unless the checkpoint has every tensor of the modules, in its shape."""
    expected = {f"{prefix}.{n}": t for prefix, module in modules.items() for n, t in module.state_dict().items()}
    missing = [name for name in expected if name not in stored]
    if len(missing) == len(expected):
        raise ValueError(
            f"A checkpoint must hold this model, got none of its {len(expected)} tensors in {path}; use this run's."
        )
    wrong = [n for n, t in expected.items() if n in stored and tuple(stored[n].size) != tuple(t.shape)]
    if missing or wrong:
        raise ValueError(
            f"A checkpoint must hold this model exactly, got {len(missing)} tensors missing and {len(wrong)} of another "
            f"shape in {path}, such as {(missing + wrong)[0]}; restore the settings it was made with."
        )


def blank_random_state(stored: dict[str, TensorStorageMetadata], rank: int) -> dict[str, Tensor]:
    """Empty tensors to load this rank's random state into."""
    prefix = f"random.rank{rank}."
    found = {name.removeprefix(prefix): entry for name, entry in stored.items() if name.startswith(prefix)}
    return {name: torch.empty(entry.size, dtype=torch.uint8) for name, entry in found.items()}


def load_tensors(path: Path, state: dict[str, Any], world: int) -> None:
    """Reads into the tensors of `state`, which any number of ranks may have written."""
    with _quiet():
        dcp.load(state, checkpoint_id=path, no_dist=world == 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def random_state(device: torch.device) -> dict[str, Tensor]:
    """All random number generators of this process, as tensors."""
    name, keys, *rest = cast("tuple", np.random.get_state())  # noqa: NPY002 libraries use the global generator
    host = json.dumps([random.getstate(), [name, keys.tolist(), *rest]]).encode()
    state = {"torch": torch.get_rng_state(), "host": torch.frombuffer(bytearray(host), dtype=torch.uint8)}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    (version, words, gauss), numpy_state = json.loads(bytes(state["host"].tolist()))
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(numpy_state))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def timm_weights(branch: Branch) -> dict[str, Tensor]:
    """The whole backbone on the host under timm's names, ready for timm.create_model(checkpoint_path=...).

    Without the mask token; with the final norm, even if it is in the summary. All ranks must call this, because it gathers
    the shards.
    """
    weights = {name: tensor for name, tensor in branch.backbone.state_dict().items() if name != "mask_token"}
    if branch.backbone.norm_eps is not None and not any(name.startswith("norm.") for name in weights):
        weights |= {f"norm.{n}": t for n, t in getattr(branch.summary, "norm", nn.Identity()).state_dict().items()}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in weights.items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in whole.items()}


class StopRequest:
    """Turns SIGTERM, the signal of schedulers and torchrun, into a flag that the training loop reads between steps."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopRequest:
        self.before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before or signal.SIG_DFL)

    def _receive(self, *_: object) -> None:
        self.received = True
