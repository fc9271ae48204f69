"""WebDataset shards: plain tar files, with an index of where each image begins and how long it is."""

from __future__ import annotations

import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checks import check, sentence
from .stored import EXTENSIONS, StoredImages

INDEX_SUFFIX = ".index"

_SCANNERS = 8  # shards scanned at a time


@dataclass(frozen=True, slots=True)
class Member:
    """An image inside a shard."""

    shard: str  # path of the tar file
    offset: int  # of the image's first byte
    size: int  # bytes
    name: str  # inside the shard
    class_name: str | None


class TarShards(StoredImages):
    """Every image of a folder of tar shards, of one shard, or of an index of them; samples, not shards, are shuffled.

    A sample is the files of one shard whose names agree up to the first dot: one image, and optionally a class in a
    file ending in .cls. An index is a text file, one image per line: shard, offset, size, name and class, with tabs
    between; without an index the headers of every shard are read at the start.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        members = _read_index(path) if path.suffix == INDEX_SUFFIX else _scan_all(_shards_at(path))
        if not members:
            remedy = f"known endings are {' '.join(sorted(EXTENSIONS))}"
            raise FileNotFoundError(sentence("TarShards: at least one image is needed", f"none in {path}", remedy))
        folder = path if path.is_dir() else path.parent
        class_names = [m.class_name for m in members if m.class_name]
        names = [f"{Path(m.shard).name}/{m.name}" for m in members]
        super().__init__(names, class_names if len(class_names) == len(members) else None)
        self.shards = sorted({m.shard for m in members})
        numbers = {shard: number for number, shard in enumerate(self.shards)}
        self._paths = [folder / shard for shard in self.shards]
        self._place = np.array([(numbers[m.shard], m.offset, m.size) for m in members], np.int64)  # [n, 3]

    def name(self, index: int) -> str:
        shard, offset, _ = self._place[index]
        return f"{self._paths[shard]} ({self.names[index].split('/', 1)[1]} at byte {offset})"

    def encoded(self, index: int) -> bytes:
        shard, offset, size = self._place[index].tolist()
        with open(self._paths[shard], "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"the shard ends early: {len(data)} of {size} bytes")
        return data

    def line(self, index: int) -> str:
        shard, offset, size = self._place[index].tolist()
        fields = [str(self._paths[shard].absolute()), str(offset), str(size), self.names[index].split("/", 1)[1]]
        return "\t".join(fields + ([self.class_names[index]] if self.class_names else []))


def _shards_at(path: Path) -> list[Path]:
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not shards or not all(shard.is_file() for shard in shards):
        rule = "TarShards: a shard or a folder of shards must exist"
        raise FileNotFoundError(sentence(rule, path, "check the path"))
    return shards


def _scan_all(shards: list[Path]) -> list[Member]:
    with ThreadPoolExecutor(_SCANNERS) as pool:
        return [member for members in pool.map(_scan, shards) for member in members]


def _scan(path: Path) -> list[Member]:
    """The images of one shard. What follows a damaged header is left out with a warning."""
    images: dict[str, tarfile.TarInfo] = {}
    class_names: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                folder, _, file = entry.name.rpartition("/")
                stem, _, ending = file.partition(".")
                key = f"{folder}/{stem}"
                if not entry.isreg() or file.startswith("."):
                    continue
                if ending == "cls":
                    content = tar.extractfile(entry)
                    assert content is not None  # as the entry is a regular file
                    class_names[key] = content.read().decode().strip()
                elif f".{ending.lower()}" in EXTENSIONS:
                    if key in images:
                        got = f"{images[key].name} and {entry.name} in {path}"
                        remedy = "give each image a name of its own before the first dot"
                        raise ValueError(sentence("TarShards: a sample must have one image", got, remedy))
                    images[key] = entry
    except tarfile.TarError as error:
        warnings.warn(f"TarShards: {path} is damaged ({error}); what follows its {len(images)} readable images is lost")
    return [Member(path.name, e.offset_data, e.size, e.name, class_names.get(key)) for key, e in images.items()]


def _read_index(path: Path) -> list[Member]:
    if not path.is_file():
        raise FileNotFoundError(sentence("TarShards: the index must exist", path, "check the path"))
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    check(
        len({len(row) for row in rows}) <= 1 and all(len(row) in (4, 5) for row in rows),
        "TarShards: every line of an index must be shard, offset, size, name and, in all or none, class",
        f"something else in {path}",
        "write it again with python -m patchlight.data.check_data",
    )
    return [Member(r[0], int(r[1]), int(r[2]), r[3], r[4] if len(r) == 5 else None) for r in rows]
