"""WebDataset shards: plain tar files, with an index of where each image begins and how long it is."""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..checks import check, sentence
from .lists import read_rows
from .stored import EXTENSIONS, StoredImages

INDEX_SUFFIX = ".index"

_SCANNERS = 8  # shards scanned at a time
_MOST_HEADER = 2**20  # bytes that a header is read for, whatever it says itself
_MOST_CLASS = 4096  # bytes of a class name
_MOST_NAMED = 3  # damaged parts of a shard that a warning names
_DIGITS = 18  # of a number in an index: it fits 64 bits


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
        if 0 < len(class_names) < len(members):
            without = len(members) - len(class_names)
            warnings.warn(f"TarShards: no classes are used, as {without} of {len(members)} images in {path} have none")
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
        return self.read_bytes(self._paths[shard], offset, size)

    def files(self) -> list[Path]:
        return self._paths

    def row(self, index: int) -> list[str]:
        shard, offset, size = self._place[index].tolist()
        fields = [str(self._paths[shard].absolute()), str(offset), str(size), self.names[index].split("/", 1)[1]]
        return fields + ([self.class_names[index]] if self.class_names else [])


def _shards_at(path: Path) -> list[Path]:
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not shards or not all(shard.is_file() for shard in shards):
        rule = "TarShards: a shard or a folder of shards must exist"
        raise FileNotFoundError(sentence(rule, path, "check the path"))
    return shards


def _scan_all(shards: list[Path]) -> list[Member]:
    members: list[Member] = []
    with ThreadPoolExecutor(_SCANNERS) as pool:
        for shard, scan in zip(shards, pool.map(_scan, shards), strict=True):
            members += scan.members
            if scan.damage:
                named = "; ".join(scan.damage[:_MOST_NAMED])
                rest = len(scan.damage) - _MOST_NAMED
                warnings.warn(
                    f"TarShards: {shard} is damaged: {named}{f'; and {rest} more' if rest > 0 else ''};"
                    f" {len(scan.members)} images of it are used"
                )
    return members


@dataclass(slots=True)
class _Scan:
    """What was found in a shard."""

    members: list[Member] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)  # what cannot be used, and why


def _scan(path: Path) -> _Scan:
    """The images of one shard. A sample whose class cannot be read is left out."""
    scan = _Scan()
    images: dict[str, tarfile.TarInfo] = {}
    class_names: dict[str, str] = {}
    without_class: set[str] = set()
    with _Headers(path) as file:
        for entry in _entries(file, scan.damage):
            folder, _, name = entry.name.rpartition("/")
            stem, _, ending = name.partition(".")
            key, is_image = f"{folder}/{stem}", f".{ending.lower()}" in EXTENSIONS
            if not entry.isreg() or name.startswith(".") or not (is_image or ending == "cls"):
                continue
            try:
                _check_place(entry, file.length)
                if is_image:
                    _check_alone(entry, images.get(key), path)
                    images[key] = entry
                else:
                    class_names[key] = _class_name(entry, file)
            except OSError as error:
                scan.damage.append(f"{entry.name!r} {error}")
                if not is_image:
                    without_class.add(key)
    for key, image in images.items():
        if key not in without_class:
            place = path.name, image.offset_data, image.size, image.name
            scan.members.append(Member(*place, class_names.get(key)))
    return scan


def _check_place(entry: tarfile.TarInfo, length: int) -> None:
    if entry.issparse():
        raise OSError("is stored with holes, which is not read")
    if (rest := length - entry.offset_data) < entry.size:
        raise OSError(f"says that it has {entry.size} bytes, where {max(0, rest)} are left")


def _check_alone(entry: tarfile.TarInfo, other: tarfile.TarInfo | None, path: Path) -> None:
    if other is not None:
        remedy = "give each image a name of its own before the first dot"
        got = f"{other.name} and {entry.name} in {path}"
        raise ValueError(sentence("TarShards: a sample must have one image", got, remedy))


def _class_name(entry: tarfile.TarInfo, file: _Headers) -> str:
    if entry.size > _MOST_CLASS:
        raise OSError(f"has {entry.size} bytes, too many for a class")
    content = os.pread(file.fileno(), entry.size, entry.offset_data)
    try:
        return content.decode().strip()
    except UnicodeDecodeError:
        raise OSError("is no UTF-8, so that the class is unknown") from None


class _Headers(io.FileIO):
    """A shard as tarfile reads its headers: a header that asks for more than the largest sensible one gets less."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.length = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_MOST_HEADER if size is None or size < 0 else min(size, _MOST_HEADER))


def _entries(file: _Headers, damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """The members of a shard in order. After damage, reading goes on at the next whole header, if there is one."""
    start = 0
    while True:
        stop = yield from _entries_from(file, start)
        if not stop.reason:
            return
        start = _next_header(file, stop.search_from)
        goes_on = f"read on at byte {start}" if start >= 0 else "nothing readable follows"
        damage.append(f"{stop.reason} at byte {stop.position}, {goes_on}")
        if start < 0:
            return


@dataclass(frozen=True, slots=True)
class _Stop:
    """Where the members of a shard end."""

    reason: str  # empty if that is the end of the shard
    position: int
    search_from: int  # a header after this may follow: the size of the last member may be wrong


def _entries_from(file: _Headers, start: int) -> Generator[tarfile.TarInfo, None, _Stop]:
    """The members from a header on, up to the end or to damage."""
    position = start
    search_from = start + tarfile.BLOCKSIZE
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.size < 0 or tar.offset <= position:
                    return _Stop("a size below zero", entry.offset, entry.offset + tarfile.BLOCKSIZE)
                position, search_from = tar.offset, entry.offset_data
                yield entry
    except Exception as error:  # tarfile raises exceptions of many types for a damaged header
        return _Stop(f"a header that cannot be read ({error})", position, search_from)
    block = os.pread(file.fileno(), tarfile.BLOCKSIZE, position)
    if block == bytes(tarfile.BLOCKSIZE):
        return _Stop("", position, position)
    return _Stop("a damaged header" if block else "no mark of the end, as if it were cut off", position, search_from)


def _next_header(file: _Headers, start: int) -> int:
    """Where the next whole header begins; -1 if there is none."""
    start += -start % tarfile.BLOCKSIZE
    for first in range(start, file.length, _MOST_HEADER):
        part = os.pread(file.fileno(), _MOST_HEADER, first)
        place = -1
        while (place := part.find(b"ustar", place + 1)) >= 0:
            block = part[(begin := place - place % tarfile.BLOCKSIZE) : begin + tarfile.BLOCKSIZE]
            if place - begin == 257:  # where a header has this word
                try:
                    tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
                except (tarfile.HeaderError, ValueError):
                    continue
                return first + begin
    return -1


def _read_index(path: Path) -> list[Member]:
    if not path.is_file():
        raise FileNotFoundError(sentence("TarShards: the index must exist", path, "check the path"))
    rows = read_rows(path)
    check(
        len({len(row) for row in rows}) <= 1
        and all(len(row) in (4, 5) for row in rows)
        and all(number.isdecimal() and len(number) <= _DIGITS for row in rows for number in row[1:3]),
        "TarShards: every line of an index must be shard, offset, size, name and, in all or none, class",
        f"something else in {path}",
        "write it again with patchlight check-data",
    )
    return [Member(r[0], int(r[1]), int(r[2]), r[3], r[4] if len(r) == 5 else None) for r in rows]
