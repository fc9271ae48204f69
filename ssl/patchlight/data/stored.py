"""What a source of images is, and how a stored image becomes pixels. Ids are stable: a source has one fixed order."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
MOST_PIXELS = 2**26  # of an image, unless a source is told otherwise: 8192 x 8192
PILLOWS_MOST_PIXELS = 178_956_970  # Pillow itself opens no larger image

Image.init()  # loads the decoders of all kinds
# An image may have another kind than its name says. Kinds whose decoder starts another program (EPS) are left out.
_KINDS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF")
_KNOWN_KINDS = tuple(kind for kind in _KINDS if kind in Image.OPEN)
_BYTES_PER_PIXEL = 16  # at most, in a file: four channels of 32 bits
_HEADERS = 2**20  # bytes of a file besides its pixels
_STRIP = 2**22  # pixels that are converted at a time

# Below the limit of a source there is nothing to warn of, above it the image is refused.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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

    @property
    def most_pixels(self) -> int:
        """An image of more pixels is not read."""

    def encoded(self, index: int) -> bytes:
        """The image as it is stored: a whole file of any of the kinds that `decode` knows."""

    def files(self) -> Sequence[Path]:
        """The files that hold the images; none if they are not stored."""


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
    most_pixels: int = MOST_PIXELS

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
    def files(self) -> Sequence[Path]:
        """The files that hold the images."""

    @abstractmethod
    def row(self, index: int) -> list[str]:
        """The image as a row of a list that `open_source` reads, whichever folder the list is in."""

    def read(self, index: int) -> np.ndarray:
        return decode(self.encoded(index), self.most_pixels)

    def read_bytes(self, path: Path, offset: int = 0, size: int | None = None) -> bytes:
        """A file, or a part of it."""
        return read_file(path, self.most_pixels, offset, size)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_file(path: Path, most_pixels: int, offset: int = 0, size: int | None = None) -> bytes:
    """A file of an image, or a part of it. What it says of itself is checked before memory is taken for it."""
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        rest = max(0, status.st_size - offset)
        wanted = rest if size is None else size
        most = _BYTES_PER_PIXEL * most_pixels + _HEADERS
        if wanted > most:
            raise ValueError(f"it has {wanted} bytes, where an image of {most_pixels} pixels has at most {most}")
        data = b""
        if wanted <= rest:
            file.seek(offset)
            data = file.read(wanted)
    if len(data) < wanted:
        raise OSError(f"the file ends early: {len(data) or rest} of {wanted} bytes")
    return data


def decode(data: bytes, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """A stored image as [H, W, 3] uint8 RGB. Its EXIF orientation is ignored, as in the published recipes."""
    with open_image(data, most_pixels) as image:
        return pixels_of(image)


def pixels_of(image: Image.Image) -> np.ndarray:
    """An image of any mode as [H, W, 3] uint8 RGB."""
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow would clip instead of scale
        gray = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):  # Pillow keeps four bytes per pixel, and copies to convert
        bottom = min(image.height, top + rows)
        part = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
    return pixels


def open_image(data: bytes, most_pixels: int) -> Image.Image:
    """A stored image whose header was read and accepted, but no pixels yet."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_KNOWN_KINDS)
    except UnidentifiedImageError:
        raise ValueError("the file is no image that Pillow knows") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"the image has more than {most_pixels} pixels, the most that are read") from None
    try:
        check_size(image.width, image.height, most_pixels)
    except ValueError:
        image.close()
        raise
    return image


def check_size(width: int, height: int, most_pixels: int) -> None:
    """A ValueError for an image of no pixels, or of too many."""
    if not 0 < width * height <= most_pixels:
        raise ValueError(f"the image has {width} x {height} pixels; 1 to {most_pixels} are read")


def as_ppm(image: np.ndarray) -> bytes:
    """An image [H, W, 3] uint8 as a file that every decoder reads to the same pixels."""
    return b"P6 %d %d 255\n" % (image.shape[1], image.shape[0]) + image.tobytes()


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without waiting for a writer, if it is a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)
