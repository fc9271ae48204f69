"""Checkpoints: sharded, with their final name only when complete, and loadable on any number of ranks."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from ..checkpoint.best import Best, BestMark
from ..checkpoint.folder import complete, delete_old, name_of, publish, set_aside, verify, write_rest
from ..checkpoint.manifest import StoredTensor
from ..checkpoint.tensors import Tensors, TensorWriter
from ..checks import check
from ..durable import make_folder
from ..process import FolderLock
from ..report.run_folder import BEST_FILE, METRICS_FILE
from .branches import Branch
from .parallel import Mesh

REFUSED_DIFFERENCES = ("model.", "objectives.", "optim.name")  # a checkpoint that differs in these is refused


class Checkpoints:
    """The checkpoints of one folder: step-<n>/ each, written as step-<n>.partial/ and renamed when complete."""

    def __init__(self, folder: Path, mesh: Mesh, keep: int, asynchronous: bool = False) -> None:
        self.folder, self.mesh, self.keep, self.asynchronous = Path(folder), mesh, keep, asynchronous
        self.mark = BestMark(self.folder.parent / BEST_FILE, self.folder)
        self.newest: Path | None = None  # the last one that was written or resumed from
        self.under_way: tuple[Future, Path] | None = None
        # A save beside the training has a process group of its own: its messages must not mix with those of training.
        self.group: Any = dist.new_group(backend="gloo") if asynchronous and mesh.world > 1 else None

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete(self.folder)

    def newest_whole(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is as it was written. Newer ones that are not are said and set aside.

        None if no checkpoint was ever completed; an error if all are damaged. Ranks share the reading.
        """
        self.mesh.barrier()
        found = self.all()
        for path in reversed(found):
            if self._is_whole(path, say, "the next older one is read"):
                self.newest = path
                return path
        set_aside_before = sorted(path.name for path in self.folder.glob("step-*.damaged*"))
        check(
            not set_aside_before,
            f"A run resumes from a checkpoint that is as it was written; {self.folder} must have one",
            f"only {', '.join(set_aside_before)}",
            "copy an intact one there, or start anew in another folder",
        )
        return None

    def _is_whole(self, path: Path, say: Callable[[str], None], otherwise: str) -> bool:
        """Whether a checkpoint is as it was written; one that is not is said and set aside. otherwise: what happens then."""
        here = verify(path, part=self.mesh.rank, parts=self.mesh.world)
        wrong = [line for lines in self.mesh.gather(here) for line in lines]
        for line in dict.fromkeys(wrong):
            say(line)
        if wrong and self.mesh.rank == 0:
            say(f"It is now called {set_aside(path).name}; {otherwise}.")
        self.mesh.barrier()
        return not wrong

    def resume_best(self, name: str, looks: Mapping[int, float], say: Callable[[str], None]) -> None:
        """Marks the best checkpoint among the looks up to the one that is resumed, which a kill may have prevented."""
        last = int(self.newest.name.removeprefix("step-")) if self.newest else 0
        found = self.mark.candidates(name, looks, last)
        there = [best for best in found if (self.folder / name_of(best.step)).exists()]
        whole = "the best of the others is marked"
        names = self.mesh.gather([name_of(best.step) for best in there])[0]  # as rank 0 has the looks
        chosen = next((n for n in names if n == name_of(last) or self._is_whole(self.folder / n, say, whole)), None)
        best = next((best for best in there if name_of(best.step) == chosen), None)
        if self.mesh.rank == 0 and (best != self.mark.marked or (best and not self.mark.link.exists())):
            self.mark.mark(best)

    def keep_if_best(self, look: Best, save: Callable[[Best], None], say: Callable[[str], None]) -> None:
        """Marks the checkpoint of this step if its look is the best so far; saves it if that has not been done."""
        if not self.mesh.any(self.mesh.rank == 0 and self.mark.improves(look.name, look.value)):
            return
        self.mark.best = look
        say(f"step {look.step}: the best {look.name} so far; the checkpoint is kept as {self.mark.link}.")
        path = self.folder / name_of(look.step)
        if self.newest != path:
            return save(look)
        self.finish()
        self._attempt(path, lambda: self._finish(look))

    def _finish(self, best: Best | None) -> None:
        """On rank 0, when a checkpoint is complete: marks it if it is the best, and deletes older ones."""
        if self.mesh.rank != 0:
            return
        if best is not None:
            self.mark.mark(best)
        delete_old(self.folder, self.keep, self.mark.marked.step if self.mark.marked else None)

    def save(
        self, step: int, state: dict[str, Any], facts: dict, teacher: dict[str, Tensor], best: Best | None = None
    ) -> Path:
        """Saves from all ranks: `state` of tensors, `facts` that fit JSON, and the teacher for use elsewhere.

        best: the look of this step, if it is the best so far.
        """
        self.finish()
        path = self.newest = self.folder / name_of(step)
        partial = path.with_suffix(".partial")
        self._attempt(path, lambda: self._make_room(partial))

        def finish(tensors: Tensors) -> None:
            """On rank 0, when the tensors of all ranks are on the disk."""
            write_rest(partial, step, facts, teacher, tensors)
            publish(partial, path)
            self._finish(best)

        writer, alone = TensorWriter(partial, finish), self.mesh.world == 1
        if self.asynchronous:
            save = dcp.async_save(state, storage_writer=writer, process_group=self.group, no_dist=alone)
            self.under_way = (cast("Future", save), path)  # the only result with these arguments
        else:
            self._attempt(path, lambda: dcp.save(state, storage_writer=writer, no_dist=alone))
        return path

    def finish(self, wait: bool = True) -> None:
        """Ends a save that is under way; wait=False does so only if it is written on all ranks."""
        if self.under_way is None:
            return
        if wait or not self.mesh.any(not self.under_way[0].done()):
            (future, path), self.under_way = self.under_way, None
            self._attempt(path, future.result)

    def _make_room(self, partial: Path) -> None:
        """On rank 0: the folder to write into, without what earlier saves have left."""
        if self.mesh.rank != 0:
            return
        for left_over in self.folder.glob("step-*.partial"):
            shutil.rmtree(left_over)
        make_folder(partial)

    def _attempt(self, path: Path, work: Callable[[], Any]) -> None:
        """Does a part of a save on every rank; if it fails on any, all raise, and the partial checkpoint is deleted."""
        error: BaseException | None = None
        try:
            work()
        except CheckpointException as problem:  # not an Exception, and its text is a traceback per rank
            error = next(iter(problem.failures.values()))[0]
        except Exception as problem:
            error = problem
        if isinstance(error, KeyboardInterrupt):
            raise error
        if not self.mesh.any(error is not None):
            return
        if self.mesh.rank == 0:
            shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)
        intact = self.all()
        raise OSError(
            f"Checkpoint {path} could not be written, got {error or 'an error on another rank'}; make room or choose "
            f"another folder, then resume from {intact[-1] if intact else 'the start: there is no earlier one'}."
        ) from error


def check_folder(folder: Path, resume: bool) -> None:
    """An error unless a run may write there. A start that failed has left no steps, so it may be tried again."""
    trained = complete(folder / "checkpoints") or (folder / METRICS_FILE).is_file()
    remedy = "set Output.resume=True to continue it, or choose another folder"
    check(resume or not trained, "A new run needs a folder of its own", f"{folder}, which holds a run", remedy)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    writable = place.is_dir() and os.access(place, os.W_OK)
    check(writable, "Output.folder must be a folder that can be written", folder, "choose another, or its permissions")


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


def check_fits(modules: dict[str, nn.Module], stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Raises unless the checkpoint has every tensor of the modules, in its shape."""
    expected = {f"{prefix}.{n}": t for prefix, module in modules.items() for n, t in module.state_dict().items()}
    missing = [name for name in expected if name not in stored]
    if len(missing) == len(expected):
        raise ValueError(
            f"A checkpoint must hold this model, got none of its {len(expected)} tensors in {path}; use this run's."
        )
    wrong = [n for n, t in expected.items() if n in stored and stored[n].shape != tuple(t.shape)]
    if missing or wrong:
        raise ValueError(
            f"A checkpoint must hold this model exactly, got {len(missing)} tensors missing and {len(wrong)} of another "
            f"shape in {path}, such as {(missing + wrong)[0]}; restore the settings it was made with."
        )


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


@contextmanager
def locked(folder: Path, mesh: Mesh, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a run's folder for its processes; an error on each of them if another run does."""
    lock = FolderLock(folder, say) if mesh.rank == 0 else None
    try:
        other = mesh.gather([lock.other if lock else ""])[0][0]
        rule = f"One run at a time may write into {folder}"
        check(not other, rule, f"another one ({other})", "wait for its end or stop it, or choose another folder")
        yield
    finally:
        if lock:
            lock.release()
