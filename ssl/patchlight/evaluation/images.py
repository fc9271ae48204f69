"""Images that an evaluation reads: opened by a path, and their centers cut out; and those that could not be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..checks import check
from ..data.procedural import ProceduralSource
from ..data.reading import TIMEOUT, describe_error
from ..data.sources import open_source
from ..data.stored import Images, Source
from ..data.workers import Workers
from .ranks import Ranks

PROCEDURAL = "procedural"  # in place of a path: images that are drawn instead of read


def open_images(path: str, procedural_images: int = 512) -> Source:
    """Images that need no labels: a folder, a list, or `procedural`."""
    return ProceduralSource(procedural_images, seed=1) if path == PROCEDURAL else open_source(path)


class Unreadable:
    """The images of an evaluation that could not be read: named when they are found, counted in the result's notes.

    Where a model is tested, and in k-NN, they are left out with their labels. Where it is trained, another image takes the
    place, with its own label.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}  # by name, of those that this process found

    def add(self, name: str, reason: str) -> None:
        if name not in self.reasons:
            warnings.warn(f"evaluation: {name} cannot be read ({reason}); it is left out, or replaced in training")
        self.reasons[name] = reason

    def notes(self, ranks: Ranks) -> tuple[str, ...]:
        """A note for the result, if there are any. All ranks must call this."""
        found = {name: reason for part in ranks.gather(self.reasons) for name, reason in part.items()}
        if not found:
            return ()
        name, reason = next(iter(sorted(found.items())))
        return (f"{len(found)} images could not be read and were left out, or replaced in training: {name} ({reason})",)


class CenterCrops(Dataset):
    """uint8 [3, size, size], its number, and why it could not be read: empty, as a rule.

    The shorter side is resized (bicubic, antialiased) and the center cut out.
    """

    def __init__(self, source: Images, ids: np.ndarray, size: int, resize_to: int) -> None:
        self.source, self.ids, self.size, self.resize_to = source, ids, size, resize_to

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: int) -> tuple[Tensor, int, str]:
        number = int(self.ids[item])
        try:
            image = torch.from_numpy(self.source.read(number)).permute(2, 0, 1)
        except Exception as error:  # decoders raise errors of any type for a damaged file
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), number, describe_error(error)
        return tv.center_crop(tv.resize(image, [self.resize_to], InterpolationMode.BICUBIC), [self.size]), number, ""


@dataclass(frozen=True)
class _Reads:
    """What a worker does for CenterBatches; a task is a range of items, empty after the last batch."""

    crops: CenterCrops
    batch: int

    def blank(self) -> dict[str, Tensor]:
        images = torch.zeros(self.batch, 3, self.crops.size, self.crops.size, dtype=torch.uint8)
        return {"images": images, "numbers": torch.zeros(self.batch, dtype=torch.int64)}

    def read(self, task: range, into: dict[str, Tensor], begin: Callable[[int], None]) -> list:
        reasons = []
        for row, item in enumerate(task):
            begin(int(self.crops.ids[item]))
            into["images"][row], into["numbers"][row], reason = self.crops[item]
            reasons.append(reason)
        return reasons

    def name(self, image: int) -> str:
        return self.crops.source.name(image)


class CenterBatches:
    """Batches of CenterCrops in their order. A worker that dies or stands still is named, with its image, and started anew."""

    def __init__(
        self, crops: CenterCrops, batch: int, workers: int = 0, pin_memory: bool = False, timeout: float = TIMEOUT
    ) -> None:
        self.reads, self.workers, self.pin_memory, self.timeout = _Reads(crops, batch), workers, pin_memory, timeout
        self.tasks = [range(first, min(first + batch, len(crops))) for first in range(0, len(crops), batch)]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        count = min(self.workers, len(self.tasks))
        if count == 0:
            for task in self.tasks:
                batch = self.reads.blank()
                yield self._part(batch, self.reads.read(task, batch, lambda image: None))
            return
        endless = chain(self.tasks, repeat(range(0)))
        workers = Workers("evaluation", self.reads, endless, count, self.timeout, self.pin_memory)
        try:
            for _ in self.tasks:
                yield self._part(*next(workers))
        finally:
            workers.close()

    def _part(self, batch: dict[str, Tensor], reasons: list) -> tuple[Tensor, Tensor, list[str]]:
        """The last batch may have fewer images."""
        return batch["images"][: len(reasons)], batch["numbers"][: len(reasons)], reasons


def readable(
    batches: Iterable[tuple[Tensor, Tensor, list[str]]], source: Images, unreadable: Unreadable
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of CenterCrops without those that could not be read: images and numbers."""
    for images, numbers, reasons in batches:
        good = [row for row, reason in enumerate(reasons) if not reason]
        for number, reason in zip(numbers.tolist(), reasons, strict=True):
            if reason:
                unreadable.add(source.name(number), reason)
        if good:
            whole = len(good) == len(reasons)
            yield (images, numbers) if whole else (images[good], numbers[good])


def check_some(count: float, images: Sized) -> None:
    """Raises if no image could be read."""
    check(count > 0, "An evaluation needs readable images", f"none of {len(images)}", "look at the warnings above")


def resize_side(size: int, whole: bool) -> int:
    """The shorter side before the center is cut out: the papers' 256 / 224 of the size, or the size for whole images."""
    return size if whole else round(size * 256 / 224)
