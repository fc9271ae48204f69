"""The CPU loader: decode and crop images in this process or in workers, from numbers drawn beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..records import Views
from .interface import Loader, Position, SourceLoader, host_tensors
from .policy import CropPolicy, CropTable, sample_crops
from .reading import Replacement, read_samples
from .stored import Images, Source
from .workers import ReadsBatches, Task, Workers

_GROUP_BYTES = 3 * 2**23  # of decoded images, after which their crops are cut


class TorchvisionLoader(SourceLoader):
    """Reads with Pillow and crops with torchvision on the CPU; the photometric step runs on whole batches on the device.

    With workers=0 the calling process does the work, otherwise that many processes read ahead, a batch each.
    """

    name = "torchvision"

    def __init__(self, source: Source, policy: CropPolicy, batch: int, *rest, **options):
        super().__init__(source, policy, batch, *rest, **options)
        self._reader = BatchReader(self, SourceBatches(self.policy, self.batch, self.seed, self.source))

    def _fetch(self, start: Position) -> Views:
        batch, replacements = self._reader.read((position.epoch, ids) for position, ids in self._schedule(start))
        self._report(replacements)
        return self._views(batch)

    def _restart(self) -> None:
        self._reader.restart()

    def close(self) -> None:
        """Ends the workers."""
        self._restart()


class BatchReader:
    """Reads the batches of a loader one after the other: in this process, or in workers, ahead."""

    def __init__(self, loader: Loader, reads: ReadsBatches):
        self.loader, self.reads = loader, reads
        self._tasks: Iterator[Task] | None = None
        self._ahead: Workers | None = None

    def read(self, tasks: Iterator[Task]) -> tuple[dict[str, Tensor], list[Replacement]]:
        """The next batch. tasks: those from the loader's position on, which are taken where none are under way."""
        try:
            if self._tasks is None:
                self._tasks = tasks
                self._ahead = self._workers(tasks) if self.loader.workers else None
            if self._ahead is not None:
                return next(self._ahead)
            batch = self.reads.blank()
            return batch, self.reads.read(next(self._tasks), batch, lambda image: None)
        except BaseException:
            self.restart()  # what is read ahead is no longer what follows the position
            raise

    def _workers(self, tasks: Iterator[Task]) -> Workers:
        loader, pin_memory = self.loader, self.loader.device.type == "cuda"
        return Workers(loader.name, self.reads, tasks, loader.workers, loader.timeout, pin_memory)

    def restart(self) -> None:
        """Ends the workers; the next batch is the first of other tasks."""
        if self._ahead is not None:
            self._ahead.close()
        self._tasks, self._ahead = None, None


@dataclass(frozen=True)
class CutBatches:
    """Cuts batches on the CPU; this runs in the workers."""

    policy: CropPolicy
    batch: int
    seed: int

    def blank(self) -> dict[str, Tensor]:
        """The tensors of a batch, in the sizes that any crops have."""
        ids = np.zeros(self.batch, np.int64)
        batch = {"ids": torch.from_numpy(ids)}
        for kind, table in sample_crops(self.policy, 0, 0, ids, np.ones((self.batch, 2), np.int64)).items():
            shape = *table.flip.shape, table.size, table.size, 3
            batch |= host_tensors(kind, table) | {f"{kind}.pixels": torch.empty(shape, dtype=torch.uint8)}
        return batch

    def read_from(
        self,
        source: Images,
        ids: np.ndarray,
        keys: tuple[int, np.ndarray],
        into: dict[str, Tensor],
        begin: Callable[[int], None],
    ) -> list[Replacement]:
        """Reads and cuts images of a source in groups, so that few of them are in memory at a time.

        keys: the epoch, and a number for each image, that its crops depend on.
        """
        epoch, numbers = keys

        def read(image: int) -> np.ndarray:
            begin(image)
            return source.read(image)

        replacements: list[Replacement] = []
        images: list[np.ndarray] = []
        samples = read_samples(source, self.seed, ids, read)
        for number in range(len(ids)):
            sample = next(samples)
            images.append(sample.content)
            into["ids"][number] = sample.id
            replacements += [sample.replacement] if sample.replacement else []
            if number == len(ids) - 1 or sum(image.size for image in images) >= _GROUP_BYTES:
                part = slice(number + 1 - len(images), number + 1)
                self._cut(epoch, numbers[part], images, {k: t[:, part] for k, t in into.items() if k != "ids"})
                images.clear()
            del sample  # or it would be in memory while the next one is read
        return replacements

    def _cut(self, epoch: int, ids: np.ndarray, images: list[np.ndarray], into: dict[str, Tensor]) -> None:
        sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
        for kind, table in sample_crops(self.policy, self.seed, epoch, ids, sizes).items():
            cut(images, table, into[f"{kind}.pixels"])
            for name, tensor in host_tensors(kind, table).items():
                into[name].copy_(tensor)


@dataclass(frozen=True)
class SourceBatches(CutBatches):
    """From (epoch, ids) to a batch of crops of a source."""

    source: Source

    def name(self, image: int) -> str:
        return self.source.name(image)

    def read(
        self, task: tuple[int, np.ndarray], into: dict[str, Tensor], begin: Callable[[int], None]
    ) -> list[Replacement]:
        return self.read_from(self.source, task[1], task, into, begin)


def cut(images: list[np.ndarray], table: CropTable, out: Tensor) -> None:
    """Cuts and resizes the table's boxes out of images [H, W, 3] uint8, and mirrors them: out [V, B, S, S, 3] uint8."""
    for b, image in enumerate(images):
        tensor = torch.from_numpy(image).permute(2, 0, 1)  # channels last in memory, for which resizing is fastest
        for v in range(len(out)):
            x, y, w, h = table.box[v, b].tolist()
            crop = resize(tensor[:, y : y + h, x : x + w], (table.size, table.size))
            out[v, b] = (crop.flip(-1) if table.flip[v, b] else crop).permute(1, 2, 0)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes [3, H, W] uint8 to size (height, width), bicubic and antialiased."""
    return tv.resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)
