"""The CPU loader: decode and crop images in this process or in workers, from numbers drawn beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..records import Views
from .interface import Loader, Position, host_tensors
from .policy import IMAGENET_MEAN, IMAGENET_STD, CropPolicy, CropTable, sample_crops
from .reading import Replacement, read_samples
from .stored import Images, Source


class TorchvisionLoader(Loader):
    """Reads with Pillow and crops with torchvision on the CPU; the photometric step runs on whole batches on the device.

    With workers=0 the calling process does the work, otherwise that many processes read ahead, a batch each.
    """

    name = "torchvision"

    def __init__(self, source: Source, policy: CropPolicy, batch: int, *rest, **options):
        super().__init__(source, policy, batch, *rest, **options)
        self._dataset = _Batches(self.source, self.policy, self.seed)
        self._ahead: Iterator | None = None

    def _fetch(self, start: Position) -> Views:
        if self.workers:
            if self._ahead is None:
                self._ahead = self._read_ahead(start)
            batch, replacements = next(self._ahead)
        else:
            batch, replacements = self._dataset[start.epoch, self._ids(start)]
        self._report(replacements)
        return self._views(batch)

    def _read_ahead(self, start: Position) -> Iterator:
        loader = DataLoader(
            self._dataset,
            batch_size=None,  # an item is a whole batch already
            sampler=_Schedule(self, start),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def _restart(self) -> None:
        self._ahead = None

    def close(self) -> None:
        """Ends the workers."""
        self._ahead = None


class _Schedule:
    """The loader's schedule as a sampler, an object that a DataLoader can iterate."""

    def __init__(self, loader: Loader, start: Position):
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return ((position.epoch, ids) for position, ids in self.loader._schedule(self.start))


class _Batches(Dataset):
    """From (epoch, ids) to a batch of crops on the CPU; this runs in the workers."""

    def __init__(self, source: Source, policy: CropPolicy, seed: int):
        self.source, self.policy, self.seed = source, policy, seed

    def __getitem__(self, item: tuple[int, np.ndarray]) -> tuple[dict[str, Tensor], list[Replacement]]:
        epoch, ids = item
        samples = read_samples(self.source, self.seed, ids, self.source.read)
        sizes = np.array([(image.shape[1], image.shape[0]) for image in samples.contents])
        tables = sample_crops(self.policy, self.seed, epoch, ids, sizes)
        batch = {"ids": torch.from_numpy(samples.ids)}
        for kind, table in tables.items():
            batch |= host_tensors(kind, table) | {f"{kind}.pixels": cut(samples.contents, table)}
        return batch, samples.replacements


def cut(images: list[np.ndarray], table: CropTable) -> Tensor:
    """Cuts and resizes the table's boxes out of images [H, W, 3] uint8, and mirrors them: [V, B, S, S, 3] uint8."""
    views, batch = table.flip.shape
    out = torch.empty(views, batch, table.size, table.size, 3, dtype=torch.uint8)
    for b, image in enumerate(images):
        tensor = torch.from_numpy(image).permute(2, 0, 1)  # channels last in memory, for which resizing is fastest
        for v in range(views):
            x, y, w, h = table.box[v, b].tolist()
            crop = resize(tensor[:, y : y + h, x : x + w], (table.size, table.size))
            out[v, b] = (crop.flip(-1) if table.flip[v, b] else crop).permute(1, 2, 0)
    return out


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes [3, H, W] uint8 to size (height, width), bicubic and antialiased."""
    return tv.resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)


def plain_batches(
    source: Images,
    size: int,
    batch: int,
    device: torch.device | str = "cpu",
    resize_to: int | None = None,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once and in order for evaluation: pixels [B, 3, size, size] normalized, ids [B] int64.

    The shorter side is resized to `resize_to` (None: size * 256 / 224) and the center is cut out.
    """
    shorter = resize_to or round(size * 256 / 224)
    shift, scale = (torch.tensor(c)[:, None, None] * 255 for c in (mean, std))
    for first in range(0, len(source), batch):
        ids = torch.arange(first, min(first + batch, len(source)))
        images = (torch.from_numpy(source.read(i)).permute(2, 0, 1) for i in ids.tolist())
        pixels = torch.stack(
            [tv.center_crop(tv.resize(i, [shorter], InterpolationMode.BICUBIC), [size]) for i in images]
        )
        yield ((pixels - shift) / scale).to(device), ids.to(device)
