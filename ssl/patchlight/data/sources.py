"""Where images come from: files or tar shards. The order is that of names or of a list, so ids are stable."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


class Source(Protocol):
    """Numbered images. Labels are optional and serve evaluation only."""

    classes: tuple[str, ...]  # empty when there are no labels
    labels: np.ndarray | None  # [n] int64
    fingerprint: str  # differs when the images or their order differ

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call the image in a message."""

    def encoded(self, index: int) -> bytes:
        """The image as it is stored: a whole file of any format that Pillow knows."""

    def read(self, index: int) -> np.ndarray:
        """The image, [H, W, 3] uint8 RGB."""


class Stored(ABC):
    """Images that are stored under names, with optional class names."""

    names: list[str]  # in the order of the ids; they decide the fingerprint
    class_names: list[str] | None  # [n], one per image
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
        """What to call the image in a message."""

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


class Files(Stored):
    """Image files."""

    def __init__(self, paths: list[Path], names: list[str], class_names: list[str] | None):
        super().__init__(names, class_names)
        self.paths = paths

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def encoded(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def line(self, index: int) -> str:
        path = str(self.paths[index].absolute())
        return f"{path}\t{self.class_names[index]}" if self.class_names else path


class ImageFolder(Files):
    """Every image under a folder, however deep. The top folders are the classes if every image lies in one."""

    def __init__(self, root: str | Path):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"ImageFolder: the folder must exist, got {root}; check the path")
        names, others = _image_names(root)
        if not names:
            raise FileNotFoundError(
                f"ImageFolder: at least one image is needed, got none among {len(others)} files under {root};"
                f" known endings are {' '.join(sorted(EXTENSIONS))}"
            )
        if others:
            warnings.warn(f"ImageFolder: left out {len(others)} files that are no images by their ending: {others[0]}")
        folders = [name.split("/", 1)[0] for name in names if "/" in name]
        super().__init__([root / name for name in names], names, folders if len(folders) == len(names) else None)


class FileList(Files):
    """A text file with one image path per line, relative to it or absolute, and optionally a tab and a class name."""

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"FileList: the list must exist, got {path}; check the path")
        rows = [line.rstrip().split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not rows:
            raise ValueError(f"FileList: at least one line is needed, got an empty {path}; write one path per line")
        if len({len(row) for row in rows}) > 1 or len(rows[0]) > 2:
            raise ValueError(
                f"FileList: every line must be a path, or every line a path, a tab and a class, got a mixture in {path};"
                " make the lines alike"
            )
        names = [row[0] for row in rows]
        super().__init__([path.parent / name for name in names], names, [row[1] for row in rows if len(row) == 2])


def open_source(path: str | Path) -> Stored:
    """A folder of images, a folder of tar shards, one shard, an index of shards, or a list of files: what the path is."""
    from .shards import INDEX_SUFFIX, TarShards  # which builds on this file

    path = Path(path)
    if path.suffix in (".tar", INDEX_SUFFIX) or (path.is_dir() and any(path.glob("*.tar"))):
        return TarShards(path)
    return ImageFolder(path) if path.is_dir() else FileList(path)


def decode(data: bytes) -> np.ndarray:
    """A stored image as [H, W, 3] uint8 RGB. Turning by EXIF is left out, as in the recipes this library follows."""
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


def _image_names(root: Path) -> tuple[list[str], list[str]]:
    """Names relative to the root, with forward slashes and sorted: images, and files that are not."""
    images, others, seen = [], [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above would never end
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        for name in files:
            if not name.startswith("."):
                is_image = os.path.splitext(name)[1].lower() in EXTENSIONS
                (images if is_image else others).append((relative / name).as_posix())
    return sorted(images), sorted(others)
