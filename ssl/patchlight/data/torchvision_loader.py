"""The CPU loader: decode and crop images in this process or in workers, from numbers drawn beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..records import Crops, Views
from .counter import SUBSTITUTE, counter_bits
from .interface import Loader, Position
from .photometric import change, look_table
from .policy import IMAGENET_MEAN, IMAGENET_STD, CropPolicy, CropTable, sample_crops
from .sources import Source

_MAX_SUBSTITUTES = 16  # so many unreadable samples in a row are no accident


@dataclass(frozen=True, slots=True)
class Replacement:
    """A sample that could not be read, and the one that stands in for it."""

    bad: int
    substitute: int
    reason: str


class TorchvisionLoader(Loader):
    """Reads with Pillow and crops with torchvision on the CPU; colors, blurs and normalizes whole batches on the device.

    workers=0 works in the calling process, otherwise that many processes read ahead, a batch each.
    """

    name = "torchvision"

    def __init__(
        self,
        source: Source,
        policy: CropPolicy,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ):
        super().__init__(source, policy, batch, seed, rank, world)
        self.workers, self.device = workers, torch.device(device)
        self._dataset = _Batches(source, policy, seed)
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
            batch_size=None,  # a work item is a whole batch already
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

    def _report(self, replacements: list[Replacement]) -> None:
        for r in replacements:
            self.replaced += 1
            warnings.warn(
                f"{self.name} loader: {self.source.name(r.bad)} cannot be read ({r.reason}); sample {r.substitute} took"
                f" its place, {self.replaced} so far on rank {self.rank}"
            )

    def _views(self, batch: dict[str, Tensor]) -> Views:
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        crops = {
            kind: Crops(
                pixels=change(batch[f"{kind}.pixels"], batch[f"{kind}.looks"], self.policy),
                box=batch[f"{kind}.box"],
                flip=batch[f"{kind}.flip"],
            )
            for kind, _ in self.policy.kinds()
        }
        return Views(crops["global_crops"], crops.get("local_crops"), crops.get("query_crops"), batch["ids"])


class _Schedule:
    """The work items from a position on, without end: (epoch, this rank's ids)."""

    def __init__(self, loader: Loader, start: Position):
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        position = self.start
        while True:
            position = self.loader._start(position)
            yield position.epoch, self.loader._ids(position)
            position = Position(position.epoch, position.samples + self.loader.global_batch)


class _Batches(Dataset):
    """From (epoch, ids) to a batch of crops on the CPU; what the workers run."""

    def __init__(self, source: Source, policy: CropPolicy, seed: int):
        self.source, self.policy, self.seed = source, policy, seed

    def __getitem__(self, item: tuple[int, np.ndarray]) -> tuple[dict[str, Tensor], list[Replacement]]:
        epoch, ids = item
        images, shown, replacements = self._read(ids)
        sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
        batch = {"ids": torch.from_numpy(shown)}
        for kind, table in sample_crops(self.policy, self.seed, epoch, ids, sizes).items():
            batch[f"{kind}.pixels"] = cut(images, table)
            batch[f"{kind}.looks"] = look_table(table)
            batch[f"{kind}.box"] = torch.from_numpy(table.box).float()
            batch[f"{kind}.flip"] = torch.from_numpy(table.flip)
        return batch, replacements

    def _read(self, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, list[Replacement]]:
        images, shown, replacements = [], [], []
        for sample in ids.tolist():
            image, substitute, reason = self._read_or_substitute(sample)
            images.append(image)
            shown.append(substitute)
            if reason:
                replacements.append(Replacement(sample, substitute, reason))
        return images, np.array(shown, dtype=np.int64), replacements

    def _read_or_substitute(self, sample: int) -> tuple[np.ndarray, int, str]:
        """The image, the id that it really has, and why it is not the sample's own ("" if it is)."""
        candidate, reason = sample, ""
        for attempt in range(_MAX_SUBSTITUTES + 1):
            try:
                return self.source.read(candidate), candidate, reason
            except Exception as error:  # decoders raise whatever they like on a damaged file
                reason = reason or f"{type(error).__name__}: {error}"
            candidate = int(counter_bits(self.seed, SUBSTITUTE, sample, attempt)[0] % np.uint64(len(self.source)))
        raise OSError(
            f"torchvision loader: one of {_MAX_SUBSTITUTES} substitutes must be readable, got none for"
            f" {self.source.name(sample)} ({reason}); repair the data"
        )


def cut(images: list[np.ndarray], table: CropTable) -> Tensor:
    """Cuts and resizes the table's boxes out of images [H, W, 3] uint8, and mirrors them: [V, B, S, S, 3] uint8."""
    views, batch = table.flip.shape
    out = torch.empty(views, batch, table.size, table.size, 3, dtype=torch.uint8)
    for b, image in enumerate(images):
        tensor = torch.from_numpy(image).permute(2, 0, 1)  # channels last in memory: resizing is fastest there
        for v in range(views):
            x, y, w, h = table.box[v, b].tolist()
            crop = resize(tensor[:, y : y + h, x : x + w], (table.size, table.size))
            out[v, b] = (crop.flip(-1) if table.flip[v, b] else crop).permute(1, 2, 0)
    return out


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes [3, H, W] uint8 to size (height, width), bicubic and antialiased."""
    return tv.resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)


def plain_batches(
    source: Source,
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
