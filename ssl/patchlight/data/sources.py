"""Where images come from: a folder, a list of files, or tar shards, and the one function that opens any of them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ..checks import check, sentence
from .lists import read_rows
from .shards import INDEX_SUFFIX, TarShards
from .stored import EXTENSIONS, MOST_PIXELS, StoredImages


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
            raise FileNotFoundError(sentence("FileList: the list must exist", path, "check the path"))
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


def open_source(path: str | Path, most_pixels: int = MOST_PIXELS) -> StoredImages:
    """Opens a folder of images, a folder of tar shards, a shard, an index of shards, or a list of files.

    most_pixels: an image that has more is not read.
    """
    path = Path(path)
    source: StoredImages
    if path.suffix in (".tar", INDEX_SUFFIX) or (path.is_dir() and any(path.glob("*.tar"))):
        source = TarShards(path)
    else:
        source = ImageFolder(path) if path.is_dir() else FileList(path)
    source.most_pixels = most_pixels
    return source


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
