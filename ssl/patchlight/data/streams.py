"""An iterable of the user's own as a source: its images in its own order, pass after pass."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check, sentence
from .items import image_in, read_image
from .reading import MAX_SUBSTITUTES, describe_error
from .shared_bytes import SharedBytes
from .stored import check_size, pixels_of
from .workers import sendable


@dataclass(frozen=True, slots=True)
class Place:
    """How far an iterable has been read."""

    passes: int = 0  # before this one
    taken: int = 0  # items of this pass
    state: Any = None  # what its state_dict returned there, if it has one


class ImageStream:
    """The items of an iterable, without end: where it ends, a new pass begins.

    If the iterable has them, `set_epoch(number of the pass)` is called before each pass; `state_dict` and `load_state_dict`
    find a place again without iterating up to it; and `sharded`, if true, says that each process gets other images.
    """

    def __init__(self, images: Iterable[Any]):
        self.images, self.title = images, type(images).__name__
        self.sharded = bool(getattr(images, "sharded", False))
        self.quiet = False  # another process says the same
        self._has_state = all(callable(getattr(images, name, None)) for name in ("state_dict", "load_state_dict"))
        self._passes, self._taken = 0, 0
        self._errors: list[str] = []  # of the last items, in a row
        self._iterator: Iterator[Any] | None = None

    def name(self, number: int) -> str:
        """An item's name in messages. number: counted from the start of the run, over all passes and ranks."""
        return f"item {number} of {self.title}"

    def place(self) -> Place:
        """Where the next item is."""
        return Place(self._passes, self._taken, self._state())

    def go_to(self, place: Place) -> None:
        """Reads on from a place."""
        check(
            self._iterator is None or self._iterator is not self.images or place.state is not None,
            f"{self.title}: an iterable must begin anew",
            "an iterator, of which a part was read",
            "pass an object that can be iterated anew",
        )
        if place.state is not None and self._has_state:
            self._set_epoch(place.passes)
            self.images.load_state_dict(place.state)  # type: ignore[attr-defined]  # it has one
            self._open(place.passes)
        else:
            self._open(place.passes)
            if place.taken:
                self._say(
                    f"{place.taken} items of pass {place.passes + 1} are read again and dropped, to go on after them"
                )
            while self._taken < place.taken:
                before = self._taken
                self.next(least=1)
                check(
                    self._passes == place.passes,
                    f"{self.title}: a resumed run must have the same images in the same order",
                    f"an end after {before} items where {place.taken} were read before",
                    "restore the images, or start a new run",
                )
        self._taken = place.taken

    def next(self, least: int) -> Any:
        """The next item; or the error in place of one that cannot be read. least: items that a pass must have."""
        while True:
            assert self._iterator is not None  # go_to comes first
            try:
                item = next(self._iterator)
            except StopIteration:
                if self._errors:
                    raise RuntimeError(self._must_go_on("its end after ")) from None
                self._begin_next_pass(least)
                continue
            except Exception as error:
                self._errors.append(describe_error(error))
                self._taken += 1
                ends = inspect.isgenerator(self._iterator)  # a generator ends with an error
                if ends or len(self._errors) > MAX_SUBSTITUTES:
                    raise RuntimeError(self._must_go_on("")) from error
                return error
            self._errors.clear()
            self._taken += 1
            return item

    def _begin_next_pass(self, least: int) -> None:
        rule = f"{self.title}: a pass must have the images of a global batch, {least}"
        got, remedy = f"{self._taken or 'none'} in pass {self._passes + 1}", "give more images or use a smaller batch"
        if self._passes and not self._taken:
            remedy = "pass an object that can be iterated anew, no iterator"
        check(self._taken >= least, rule, got, remedy)
        self._say(f"pass {self._passes + 1} has ended after {self._taken} items; pass {self._passes + 2} begins")
        self._open(self._passes + 1)

    def _open(self, passes: int) -> None:
        """Starts iterating."""
        self._set_epoch(passes)
        self._iterator, self._passes, self._taken = iter(self.images), passes, 0
        self._errors.clear()

    def _set_epoch(self, passes: int) -> None:
        if callable(set_epoch := getattr(self.images, "set_epoch", None)):
            set_epoch(passes)

    def _state(self) -> Any:
        """The iterable's own state, if it can be kept in a checkpoint."""
        if not self._has_state:
            return None
        try:
            return json.loads(json.dumps(self.images.state_dict()))  # type: ignore[attr-defined]  # it has one
        except (TypeError, ValueError) as error:
            self._has_state = False
            self._say(
                f"its state_dict has more than plain values ({describe_error(error)}), which a checkpoint does not hold;"
                " a run that is resumed reads it again up to its place"
            )
            return None

    def _must_go_on(self, how: str) -> str:
        """What is wrong with an iterable that ends with an error. how: it has ended."""
        rule = f"{self.title}: an iterable must go on after an item that cannot be read"
        got = f"{how}{self._errors[-1]}, after {self._taken - len(self._errors)} items of pass {self._passes + 1}"
        remedy = "catch the error there and leave the item out, or give paths or bytes, which loaders decode"
        return sentence(rule, got, remedy)

    def _say(self, text: str) -> None:
        if not self.quiet:
            warnings.warn(f"{self.title}: {text}")


@dataclass(frozen=True)
class PackedItems:
    """Items of a batch, by their place in it."""

    numbers: np.ndarray  # of the items
    title: str
    most_pixels: int
    memory: SharedBytes  # pixels and files
    parts: tuple[Any, ...]  # per item: its start in the memory and its shape there, a path, or why it cannot be read

    def __len__(self) -> int:
        return len(self.parts)

    def name(self, index: int) -> str:
        return f"item {self.numbers[index]} of {self.title}"

    def read(self, index: int) -> np.ndarray:
        part = self.parts[index]
        if isinstance(part, Exception):
            raise part
        if isinstance(part, Path):
            return read_image(part, self.most_pixels)
        start, shape = part
        values = self.memory.values[start : start + int(np.prod(shape))]
        return read_image(values.tobytes() if len(shape) == 1 else values.reshape(shape), self.most_pixels)


def pack(items: list[Any], numbers: np.ndarray, stream: ImageStream, most_pixels: int) -> PackedItems:
    """Items as a stream gives them, for the workers. Pillow's images become pixels here, files stay what they are."""
    found = [
        _part(item, stream.name(number), most_pixels) for item, number in zip(items, numbers.tolist(), strict=True)
    ]
    memory = SharedBytes(sum(part.size for part in found if isinstance(part, np.ndarray)))
    parts: list[Any] = []
    start = 0
    for part in found:
        if isinstance(part, np.ndarray):
            memory.values[start : start + part.size] = part.reshape(-1)
            parts.append((start, part.shape))
            start += part.size
        else:
            parts.append(part)
    return PackedItems(numbers, stream.title, most_pixels, memory, tuple(parts))


def _part(item: Any, name: str, most_pixels: int) -> np.ndarray | Path | Exception:
    if isinstance(item, Exception):
        return sendable(item)
    image = image_in(item, name)
    if isinstance(image, bytes):
        return np.frombuffer(image, np.uint8)
    if isinstance(image, Path | np.ndarray):
        return image
    try:
        check_size(image.width, image.height, most_pixels)
        return pixels_of(image)
    except Exception as error:  # a damaged file can raise any exception in a decoder
        return sendable(error)
