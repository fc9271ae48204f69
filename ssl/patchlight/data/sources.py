"""Where images come from: a folder, a list of files, tar shards, or a data set of the user's own; and what opens any of them."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ..checks import check, sentence
from ..file_functions import call_alone, function_of, names_function
from .dataset_source import DatasetSource, NumberedItems
from .lists import read_rows
from .shards import INDEX_SUFFIX, TarShards
from .stored import EXTENSIONS, MOST_PIXELS, Source, StoredImages
from .streams import ImageStream

OwnImages = NumberedItems | Iterable[Any]  # a data set of the user's own
DATA_SET = "data set"  # what such a function returns


class Files(StoredImages):
    """Image files."""

    def __init__(self, paths: list[Path], names: list[str], class_names: list[str] | None):
        super().__init__(names, class_names)
        self.paths = paths

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def encoded(self, index: int) -> bytes:
        return self.read_bytes(self.paths[index])

    def files(self) -> list[Path]:
        return self.paths

    def row(self, index: int) -> list[str]:
        path = str(self.paths[index].absolute())
        return [path, self.class_names[index]] if self.class_names else [path]


class ImageFolder(Files):
    """Every image under a folder, at any depth. The top folders are the classes if every image lies in one of them."""

    def __init__(self, root: str | Path):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(sentence("ImageFolder: the folder must exist", root, "check the path"))
        names, others = _image_names(root)
        if not names:
            got = f"none among {len(others)} files under {root}"
            remedy = f"known endings are {' '.join(sorted(EXTENSIONS))}"
            raise FileNotFoundError(sentence("ImageFolder: at least one image is needed", got, remedy))
        if others:
            warnings.warn(f"ImageFolder: left out {len(others)} files that are no images by their ending: {others[0]}")
        folders = [name.split("/", 1)[0] for name in names if "/" in name]
        super().__init__([root / name for name in names], names, folders if len(folders) == len(names) else None)


class FileList(Files):
    """A text file with one image path per line, relative to it or absolute, and optionally a tab and a class name.

    Unusual names are quoted as `lists` says.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(sentence("A folder or a list of images must exist", path, "check the path"))
        rows = read_rows(path)
        check(len(rows) > 0, "FileList: at least one line is needed", f"an empty {path}", "write one path per line")
        check(
            len({len(row) for row in rows}) == 1 and len(rows[0]) <= 2,
            "FileList: every line must be a path, or every line a path, a tab and a class",
            f"a mixture in {path}",
            "make the lines alike",
        )
        names = [row[0] for row in rows]
        super().__init__([path.parent / name for name in names], names, [row[1] for row in rows if len(row) == 2])


def open_source(path: str | Path, most_pixels: int = MOST_PIXELS) -> Source:
    """Opens a folder of images, a folder of tar shards, a shard, an index of shards, a list of files, or the data set that a
    function of a file returns (`my_images.py:images`).

    most_pixels: an image that has more is not read.
    """
    found = open_images(path, most_pixels)
    rule, remedy = "Images must have numbers here", "return a data set that has len(data) and data[number]"
    if isinstance(found, ImageStream):
        raise ValueError(sentence(rule, f"{path}, which returns an iterable", remedy))
    return found


def open_images(path: str | Path, most_pixels: int = MOST_PIXELS) -> Source | ImageStream:
    """The same, but the function may also return an iterable."""
    text, path = str(path), Path(path)
    if names_function(text):
        return open_own(call_alone(text, function_of(text, DATA_SET), DATA_SET), most_pixels)
    source: StoredImages
    if path.suffix in (".tar", INDEX_SUFFIX) or (path.is_dir() and any(path.glob("*.tar"))):
        source = TarShards(path)
    else:
        source = ImageFolder(path) if path.is_dir() else FileList(path)
    source.most_pixels = most_pixels
    return source


def open_own(images: OwnImages, most_pixels: int = MOST_PIXELS) -> DatasetSource | ImageStream:
    """A data set of the user's own: one with a length and numbered items, or an iterable."""
    title = type(images).__name__
    rule = "A data set must have a length and items by number, or be iterable"
    if isinstance(images, str | bytes | Path):
        raise ValueError(sentence(rule, repr(images), "give a path as Data.path"))
    if isinstance(images, Mapping):
        raise ValueError(sentence(rule, f"a {title} with {', '.join(map(str, images))}", "take one of its parts"))
    if isinstance(images, DataLoader) and images.batch_size is not None:
        raise ValueError(sentence(rule, f"a {title}, whose items are batches", "pass its data set"))
    # torch's IterableDataset has both by name, but has no items by number.
    if isinstance(images, NumberedItems) and not isinstance(images, IterableDataset):
        return DatasetSource(images, most_pixels)
    if isinstance(images, Iterable):
        return ImageStream(images)
    called = f"the function {images.__name__}" if inspect.isroutine(images) else f"one {title}"
    remedy = "pass what it returns" if inspect.isroutine(images) else "give it len(data) and data[number], or iteration"
    raise ValueError(sentence(rule, called, remedy))


def _image_names(root: Path) -> tuple[list[str], list[str]]:
    """Names relative to the root, with forward slashes and sorted: of images, and of other files."""
    images: list[str] = []
    others: list[str] = []
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link to a folder above would never end
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        for name in files:
            if not name.startswith("."):
                is_image = os.path.splitext(name)[1].lower() in EXTENSIONS
                (images if is_image else others).append((relative / name).as_posix())
    return sorted(images), sorted(others)
