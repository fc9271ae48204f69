"""What a source of images is, and how a stored image becomes pixels. Ids are stable: a source has one fixed order."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


class Images(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's name in messages."""

    def read(self, index: int) -> np.ndarray:
        """The image, [H, W, 3] uint8 RGB."""


class Source(Images, Protocol):
    """Numbered images. Labels are optional and used by evaluation only."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty when there are no labels."""

    @property
    def labels(self) -> np.ndarray | None:
        """[n] int64."""

    @property
    def fingerprint(self) -> str:
        """Differs when the images or their order differ."""

    def encoded(self, index: int) -> bytes:
        """The image as it is stored: a whole file of any format that Pillow knows."""


@dataclass(frozen=True)
class Subset:
    """Some images of a source, by their ids there."""

    source: Images
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        return self.source.name(int(self.ids[index]))

    def read(self, index: int) -> np.ndarray:
        return self.source.read(int(self.ids[index]))


class StoredImages(ABC):
    """Images that are stored under names, with optional class names."""

    names: list[str]  # in the order of the ids; they decide the fingerprint
    class_names: list[str] | None  # [n], of each image
    classes: tuple[str, ...]
    labels: np.ndarray | None

    def __init__(self, names: list[str], class_names: list[str] | None):
        self.names, self.class_names = names, class_names
        self.classes = tuple(sorted(set(class_names))) if class_names else ()
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([numbers[name] for name in class_names], dtype=np.int64) if class_names else None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def name(self, index: int) -> str:
        """The image's name in messages."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The image as it is stored."""

    @abstractmethod
    def line(self, index: int) -> str:
        """The image as a line of a list that `open_source` reads, whichever folder the list is in."""

    def read(self, index: int) -> np.ndarray:
        return decode(self.encoded(index))

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def decode(data: bytes) -> np.ndarray:
    """A stored image as [H, W, 3] uint8 RGB. Its EXIF orientation is ignored, as in the published recipes."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("the file is no image that Pillow knows") from None
    with image:
        if image.mode.startswith("I"):  # 16 bits per pixel: Pillow would clip instead of scale
            gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(gray[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def as_ppm(image: np.ndarray) -> bytes:
    """An image [H, W, 3] uint8 as a file that every decoder reads to the same pixels."""
    return b"P6 %d %d 255\n" % (image.shape[1], image.shape[0]) + image.tobytes()
