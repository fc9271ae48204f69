"""The interface of every loader: an endless iterator of Views on the device, whose state is a position."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checks import check, sentence
from ..records import Crops, Views
from .contents import describe_changes, look_at
from .lists import format_row
from .photometric import apply_photometric, photometric_table
from .policy import CropPolicy, CropTable
from .random_numbers import ORDER, random_bits
from .reading import TIMEOUT, Replacement
from .stored import Source

MOST_BAD = 0.05  # share of unreadable images above which a run stops


@dataclass(frozen=True, slots=True)
class Position:
    """How far the stream has been read, in samples, so that it means the same for any batch size and number of ranks."""

    epoch: int = 0
    samples: int = 0  # taken from this epoch's order, over all ranks


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of all samples in an epoch: ids [size] int64, the same on every rank."""
    return np.argsort(random_bits(seed, ORDER, epoch, np.arange(size)), kind="stable")


class Loader(ABC):
    """An endless iterator of Views. Each step takes the next `batch * world` samples and rank r keeps the r-th part of them."""

    name: str  # for reports and messages
    dataset_size: int  # images of an epoch, over all ranks
    bad_remedy = "leave them out of the data set, or raise Data.most_bad"  # where too many images cannot be read

    def __init__(
        self,
        policy: CropPolicy,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        most_bad: float = MOST_BAD,
        report: Path | None = None,
        timeout: float = TIMEOUT,
    ):
        """workers: processes or threads that read ahead. report: the file that lists unreadable images, a line each.

        timeout: seconds in which a worker must begin another image.
        """
        self.policy, self.batch, self.seed = policy, batch, seed
        self.rank, self.world, self.workers, self.device = rank, world, workers, torch.device(device)
        self.most_bad, self.report, self.timeout = most_bad, report, timeout
        self.stall_seconds = 0.0  # time that the last next() waited for data
        self.replaced = 0  # unreadable samples that were replaced, on this rank, since the run began
        self._bad: set[int] = set()  # samples found unreadable by this object
        check(
            batch >= 1 and 0 <= rank < world,
            f"{self.name} loader: batch must be positive and rank in [0, world)",
            f"batch={batch}, rank={rank}, world={world}",
            "pass this process's rank and the number of processes",
        )

    @property
    def global_batch(self) -> int:
        return self.batch * self.world

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Views:
        began = time.perf_counter()
        views = self._next()
        self.stall_seconds = time.perf_counter() - began
        return views

    @abstractmethod
    def _next(self) -> Views:
        """This rank's part of the next batch; moves on."""

    @abstractmethod
    def sample_name(self, number: int) -> str:
        """A sample's name in messages."""

    @abstractmethod
    def state_dict(self) -> dict:
        """Where the loader is, in plain values. A key `of_rank`, if there is one, has what differs between ranks."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""

    def close(self) -> None:  # noqa: B027 a loader that reads nothing ahead has nothing to end
        """Ends the threads or processes that read ahead."""

    def _restart(self) -> None:  # noqa: B027 a loader that reads nothing ahead has nothing to discard
        """Discards what was read ahead: the position has changed."""

    def _may_be_bad(self) -> int:
        """The number of images of which the share `most_bad` may be unreadable."""
        return self.dataset_size

    def _report(self, replacements: list[Replacement]) -> None:
        """Counts and reports what was replaced; ends the run when too many images are bad."""
        for r in replacements:
            self.replaced += 1
            name = self.sample_name(r.bad)
            warnings.warn(
                f"{self.name} loader: {name} cannot be read ({r.reason}); sample {r.substitute} took its place,"
                f" {self.replaced} so far on rank {self.rank}"
            )
            if r.bad not in self._bad and self.report is not None:
                self.report.parent.mkdir(parents=True, exist_ok=True)
                with self.report.open("a", encoding="utf-8") as file:
                    file.write(f"{format_row((name, r.reason))}\n")
            self._bad.add(r.bad)
        if len(self._bad) > self.most_bad * self._may_be_bad():
            rule = f"{self.name} loader: at most {self.most_bad:.2%} of {self._may_be_bad()} images may be unreadable"
            listed = self.report or "the warnings above"
            got = f"{len(self._bad)} on rank {self.rank} alone, listed in {listed}"
            raise RuntimeError(sentence(rule, got, self.bad_remedy))

    def _views(self, batch: dict[str, Tensor]) -> Views:
        """A batch of cut crops and their host_tensors as Views. Without a photometric table, crops are changed already."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        crops: dict[str, Crops] = {}
        for kind, _ in self.policy.kinds():
            pixels, table = batch[f"{kind}.pixels"], batch.get(f"{kind}.photometric")
            changed = pixels if table is None else apply_photometric(pixels, table, self.policy)
            crops[kind] = Crops(pixels=changed, box=batch[f"{kind}.box"], flip=batch[f"{kind}.flip"])
        return Views(crops["global_crops"], crops.get("local_crops"), crops.get("query_crops"), batch["ids"])


class SourceLoader(Loader):
    """A loader of numbered images. Ids and augmentations depend on seed, epoch and position in the epoch only.

    What is left at the end of an epoch and does not fill a step is dropped.
    """

    def __init__(self, source: Source, policy: CropPolicy, batch: int, *rest, **options):
        super().__init__(policy, batch, *rest, **options)
        self.source, self.dataset_size = source, len(source)
        if source.files():
            self.bad_remedy = "run patchlight check-data and train on its clean list"
        self._position = Position()
        self._cached_order: tuple[int, np.ndarray] | None = None
        check(
            len(source) >= self.global_batch,
            f"{self.name} loader: an epoch needs at least one global batch",
            f"{len(source)} images for {batch} images x {self.world} ranks",
            "use a smaller batch or more images",
        )
        # One rank looks at the files: they are the same for all.
        self._contents = look_at(source.files() if self.rank == 0 else ()).state()

    @property
    def steps_per_epoch(self) -> int:
        return self.dataset_size // self.global_batch

    def sample_name(self, number: int) -> str:
        return self.source.name(number)

    def _next(self) -> Views:
        start = self._batch_start(self._position)
        if start.epoch != self._position.epoch:
            self._compare_contents("at the start of the last epoch")
        views = self._fetch(start)
        self._position = Position(start.epoch, start.samples + self.global_batch)
        return views

    @abstractmethod
    def _fetch(self, start: Position) -> Views:
        """This rank's part of the batch that starts there."""

    def _batch_start(self, position: Position) -> Position:
        """Where the next batch starts: in the next epoch, when this epoch has no full batch left."""
        if position.samples + self.global_batch > self.dataset_size:
            return Position(position.epoch + 1)
        return position

    def _ids(self, start: Position) -> np.ndarray:
        """This rank's ids [B] int64 of the batch that starts there."""
        if self._cached_order is None or self._cached_order[0] != start.epoch:
            self._cached_order = (start.epoch, epoch_order(self.seed, start.epoch, self.dataset_size))
        first = start.samples + self.rank * self.batch
        return self._cached_order[1][first : first + self.batch]

    def _schedule(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """All batches from a position on, without end: the position of each, and this rank's ids of it."""
        while True:
            start = self._batch_start(start)
            yield start, self._ids(start)
            start = Position(start.epoch, start.samples + self.global_batch)

    def _compare_contents(self, when: str) -> None:
        """Says aloud if files have changed since then; from now on, compares with what they are now."""
        if self.rank == 0:
            now = look_at(self.source.files())
            if changes := describe_changes(self._contents, now, self.source.files()):
                warnings.warn(
                    f"{self.name} loader: the data are not what they were {when}: {changes}. Training goes on with what"
                    " the files hold now; restore them or start a new run if that is not meant."
                )
            self._contents = now.state()

    def state_dict(self) -> dict:
        return {
            "epoch": self._position.epoch,
            "samples": self._position.samples,
            "seed": self.seed,
            "dataset_size": self.dataset_size,
            "fingerprint": self.source.fingerprint,
            "replaced": self.replaced,
            "contents": self._contents,
        }

    def load_state_dict(self, state: dict) -> None:
        check_same_data(self.name, state, self.state_dict(), ("dataset_size", "fingerprint", "seed"))
        self._position = Position(state["epoch"], state["samples"])
        self.replaced = state["replaced"]
        self._contents = state["contents"]
        self._compare_contents("when the run that is resumed looked at them")
        self._restart()


def check_same_data(loader: str, saved: dict, here: dict, keys: Sequence[str]) -> None:
    """Refuses the state of a loader that read other data."""
    for key in keys:
        check(
            key in saved and saved[key] == here[key],
            f"{loader} loader: a resumed run must have the same data in the same order",
            f"{key}={here[key]!r} where the checkpoint has {saved.get(key)!r}",
            "restore the data and the seed, or start a new run",
        )


def host_tensors(kind: str, table: CropTable) -> dict[str, Tensor]:
    """The numbers of a kind of crops that are needed after cutting, under the names that `Loader._views` reads."""
    return {
        f"{kind}.photometric": photometric_table(table),
        f"{kind}.box": torch.from_numpy(table.box).float(),
        f"{kind}.flip": torch.from_numpy(table.flip),
    }
