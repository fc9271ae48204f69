"""The CPU loader: decode and crop images in this process or in workers, from numbers drawn beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..records import Views
from .interface import Loader, Position, host_tensors
from .policy import CropPolicy, CropTable, sample_crops
from .reading import Replacement, read_samples
from .stored import Source
from .workers import Workers

_GROUP_BYTES = 3 * 2**23  # of decoded images, after which their crops are cut


class TorchvisionLoader(Loader):
    """Reads with Pillow and crops with torchvision on the CPU; the photometric step runs on whole batches on the device.

    With workers=0 the calling process does the work, otherwise that many processes read ahead, a batch each.
    """

    name = "torchvision"

    def __init__(self, source: Source, policy: CropPolicy, batch: int, *rest, **options):
        super().__init__(source, policy, batch, *rest, **options)
        self._batches = _Batches(self.source, self.policy, self.batch, self.seed)
        self._ahead: Workers | None = None

    def _fetch(self, start: Position) -> Views:
        if self.workers:
            if self._ahead is None:
                self._ahead = self._read_ahead(start)
            try:
                batch, replacements = next(self._ahead)
            except BaseException:
                self._restart()  # what is read ahead is no longer what follows this position
                raise
        else:
            batch = self._batches.blank()
            replacements = self._batches.read((start.epoch, self._ids(start)), batch, lambda image: None)
        self._report(replacements)
        return self._views(batch)

    def _read_ahead(self, start: Position) -> Workers:
        tasks = ((position.epoch, ids) for position, ids in self._schedule(start))
        pin_memory = self.device.type == "cuda"
        return Workers(self.name, self._batches, tasks, self.workers, self.timeout, pin_memory)

    def _restart(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def close(self) -> None:
        """Ends the workers."""
        self._restart()


@dataclass(frozen=True)
class _Batches:
    """From (epoch, ids) to a batch of crops on the CPU; this runs in the workers."""

    source: Source
    policy: CropPolicy
    batch: int
    seed: int

    def name(self, image: int) -> str:
        return self.source.name(image)

    def blank(self) -> dict[str, Tensor]:
        """The tensors of a batch, in the sizes that any crops have."""
        ids = np.zeros(self.batch, np.int64)
        batch = {"ids": torch.from_numpy(ids)}
        for kind, table in sample_crops(self.policy, 0, 0, ids, np.ones((self.batch, 2), np.int64)).items():
            shape = *table.flip.shape, table.size, table.size, 3
            batch |= host_tensors(kind, table) | {f"{kind}.pixels": torch.empty(shape, dtype=torch.uint8)}
        return batch

    def read(
        self, task: tuple[int, np.ndarray], into: dict[str, Tensor], begin: Callable[[int], None]
    ) -> list[Replacement]:
        """Reads and cuts the images in groups, so that few of them are in memory at a time."""
        epoch, ids = task

        def read(image: int) -> np.ndarray:
            begin(image)
            return self.source.read(image)

        replacements: list[Replacement] = []
        images: list[np.ndarray] = []
        samples = read_samples(self.source, self.seed, ids, read)
        for number in range(len(ids)):
            sample = next(samples)
            images.append(sample.content)
            into["ids"][number] = sample.id
            replacements += [sample.replacement] if sample.replacement else []
            if number == len(ids) - 1 or sum(image.size for image in images) >= _GROUP_BYTES:
                part = slice(number + 1 - len(images), number + 1)
                self._cut(epoch, ids[part], images, {k: t[:, part] for k, t in into.items() if k != "ids"})
                images.clear()
            del sample  # or it would be in memory while the next one is read
        return replacements

    def _cut(self, epoch: int, ids: np.ndarray, images: list[np.ndarray], into: dict[str, Tensor]) -> None:
        sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
        for kind, table in sample_crops(self.policy, self.seed, epoch, ids, sizes).items():
            cut(images, table, into[f"{kind}.pixels"])
            for name, tensor in host_tensors(kind, table).items():
                into[name].copy_(tensor)


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
