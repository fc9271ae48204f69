"""The loader of iterables: they are read in this process, in their own order; workers decode and crop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..checks import check
from ..records import Views
from .interface import Loader, check_same_data
from .policy import CropPolicy
from .reading import Replacement
from .stored import MOST_PIXELS
from .streams import ImageStream, PackedItems, Place, pack
from .torchvision_loader import BatchReader, CutBatches


class StreamLoader(Loader):
    """Crops the items of an iterable; a sample's id is its running number, on which its crops depend, with the seed.

    Every rank reads the whole iterable and keeps its part of each global batch; if the iterable is sharded, rank r reads
    all of its own.
    """

    name = "stream"

    def __init__(
        self,
        stream: ImageStream,
        policy: CropPolicy,
        batch: int,
        *rest,
        epoch_images: int,
        most_pixels: int = MOST_PIXELS,
        **options,
    ):
        """epoch_images: that count as an epoch."""
        super().__init__(policy, batch, *rest, **options)
        self.stream, self.dataset_size, self.most_pixels = stream, epoch_images, most_pixels
        stream.quiet = self.rank > 0 and not stream.sharded
        self._samples = 0  # read by all ranks together
        self._place = Place()
        self._places: deque[Place] = deque()  # after each batch that was read ahead
        self._reader = BatchReader(self, StreamBatches(self.policy, self.batch, self.seed, stream.title))

    def sample_name(self, number: int) -> str:
        return self.stream.name(number)

    def _next(self) -> Views:
        try:
            batch, replacements = self._reader.read(self._tasks())
        except BaseException:
            self._places.clear()
            raise
        self._samples += self.global_batch
        self._place = self._places.popleft()
        self._report(replacements)
        return self._views(batch)

    def _tasks(self) -> Iterator[PackedItems]:
        """This rank's items of all batches from the position on."""
        samples = self._samples
        self.stream.go_to(self._place)
        while True:
            packed = self._read(samples)
            samples += self.global_batch
            self._places.append(self.stream.place())
            yield packed

    def _read(self, samples: int) -> PackedItems:
        """This rank's items of the batch that starts there."""
        before = self.rank * self.batch
        count, first = (self.batch, 0) if self.stream.sharded else (self.global_batch, before)
        items = []
        for number in range(count):
            item = self.stream.next(least=count)
            if first <= number < first + self.batch:
                items.append(item)
        return pack(items, samples + before + np.arange(self.batch), self.stream, self.most_pixels)

    def _may_be_bad(self) -> int:
        return max(self.dataset_size, self._samples)

    def _restart(self) -> None:
        self._reader.restart()
        self._places.clear()

    def close(self) -> None:
        """Ends the workers."""
        self._restart()

    def state_dict(self) -> dict:
        return {
            "samples": self._samples,
            "seed": self.seed,
            "stream": self.stream.title,
            "sharded": self.stream.sharded,
            "replaced": self.replaced,
            "of_rank": asdict(self._place),
        }

    def load_state_dict(self, state: dict) -> None:
        """state: that of this rank, or with the places of all ranks as `of_ranks`."""
        check_same_data(self.name, state, self.state_dict(), ("seed", "stream", "sharded"))
        places = state.get("of_ranks", [state["of_rank"]])
        check(
            not self.stream.sharded or len(places) == self.world,
            f"{self.name} loader: a sharded iterable is resumed on as many processes as have read it",
            f"{self.world} where there were {len(places)}",
            f"start {len(places)} processes",
        )
        self._samples, self.replaced = state["samples"], state["replaced"]
        self._place = Place(**places[self.rank if self.stream.sharded else 0])
        self._restart()


@dataclass(frozen=True)
class StreamBatches(CutBatches):
    """From packed items to a batch of crops; a substitute comes from the same batch."""

    title: str

    def name(self, image: int) -> str:
        return f"item {image} of {self.title}"

    def read(self, task: PackedItems, into: dict[str, Tensor], begin: Callable[[int], None]) -> list[Replacement]:
        numbers = task.numbers
        places = np.arange(len(numbers))
        found = self.read_from(task, places, (0, numbers), into, lambda place: begin(int(numbers[place])))
        into["ids"].copy_(torch.from_numpy(numbers)[into["ids"]])
        return [replace(r, bad=int(numbers[r.bad]), substitute=int(numbers[r.substitute])) for r in found]
