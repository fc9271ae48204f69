"""The manifest of a checkpoint: which files it has, the checksums of their bytes, and which tensors lie where."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from ..checks import sentence
from ..durable import durable_file

MANIFEST = "manifest.json"
FORMAT = 1  # of all files of a checkpoint; grows when an older version cannot read them
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_AT_A_TIME = 1 << 24  # bytes that are checked at a time


class DamagedError(ValueError):
    """A checkpoint whose bytes are not those that were written."""


class NewerFormatError(ValueError):
    """A checkpoint that a newer version of patchlight has written."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that follow each other in a file."""

    begin: int
    length: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor, and the piece of a file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    piece: int  # its number in the file


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint; its chunks cover it."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All files of a checkpoint but this one, as pieces that cover them, and the tensors in them."""

    step: int
    files: dict[str, tuple[Piece, ...]]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes the manifest, with a checksum of itself."""
        content = {
            "format": FORMAT,
            "step": self.step,
            "files": {name: [[p.begin, p.length, p.checksum] for p in pieces] for name, pieces in self.files.items()},
            "tensors": {
                name: [t.dtype, t.shape, [[c.offsets, c.sizes, c.file, c.piece] for c in t.chunks]]
                for name, t in self.tensors.items()
            },
        }
        whole = {"checksum": checksum(_canonical(content)), "content": content}
        with durable_file(folder / MANIFEST) as file:
            file.write(json.dumps(whole).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint; raises DamagedError if it is not what was written."""
        path = folder / MANIFEST
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise damaged(folder, f"a {MANIFEST} that is no file")
        try:
            whole = json.loads(path.read_bytes())
            content = whole["content"]
            if whole["checksum"] != checksum(_canonical(content)):
                raise damaged(folder, f"a {MANIFEST} whose checksum is wrong")
            if content["format"] > FORMAT:
                raise NewerFormatError(
                    sentence(
                        f"A checkpoint must have format {FORMAT} or an older one",
                        f"{content['format']} in {folder}",
                        "read it with the version of patchlight that wrote it",
                    )
                )
            files = {
                _plain(name): tuple(Piece(*piece) for piece in pieces) for name, pieces in content["files"].items()
            }
            tensors = {name: _tensor(*entry) for name, entry in content["tensors"].items()}
            _check_places(tensors, files)
            return cls(int(content["step"]), files, tensors)
        except FileNotFoundError as error:
            raise damaged(folder, f"no {MANIFEST}") from error
        except (DamagedError, NewerFormatError):
            raise
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise damaged(folder, f"a {MANIFEST} that cannot be read ({type(error).__name__}: {error})") from error


def _plain(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no plain file name")
    return name


def _tensor(dtype: str, shape: list[int], chunks: list[list[Any]]) -> StoredTensor:
    found = (Chunk(tuple(offsets), tuple(sizes), file, piece) for offsets, sizes, file, piece in chunks)
    return StoredTensor(dtype, tuple(shape), tuple(found))


def _check_places(tensors: dict[str, StoredTensor], files: dict[str, tuple[Piece, ...]]) -> None:
    """A ValueError or LookupError unless each chunk has a piece of its size, inside of its tensor."""
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            ends = (offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
            inside = all(end <= side for end, side in zip(ends, tensor.shape, strict=True))
            length = math.prod(chunk.sizes) * ITEM_BYTES[tensor.dtype]
            if not inside or min((*chunk.offsets, *chunk.sizes, chunk.piece, 0)) < 0:
                raise ValueError(f"a chunk of {name} lies outside of it")
            if files[chunk.file][chunk.piece].length != length:
                raise ValueError(f"a chunk of {name} has other than {length} bytes")


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def damaged(folder: Path, got: str) -> DamagedError:
    """The error for a checkpoint with such damage."""
    return DamagedError(sentence("A checkpoint must be as it was written", f"{got} in {folder}", "use another one"))


def checksum(data: Any) -> str:
    """Of a buffer: XXH3, 64 bits, which is faster than any disk."""
    return xxhash.xxh3_64_hexdigest(data)


class PieceWriter:
    """Writes a file piece by piece."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.pieces: list[Piece] = []

    def write(self, data: Any) -> None:
        """Writes a buffer as one piece."""
        begin = self.pieces[-1].begin + self.pieces[-1].length if self.pieces else 0
        data = memoryview(data).cast("B") if memoryview(data).nbytes else b""
        self.file.write(data)
        self.pieces.append(Piece(begin, len(data), checksum(data)))


@contextmanager
def pieces_of(path: Path) -> Iterator[PieceWriter]:
    """A new file to write piece by piece; it is on the disk when the block ends."""
    with durable_file(path) as file:
        yield PieceWriter(file)


def read_piece(folder: Path, file: BufferedReader, name: str, piece: Piece) -> bytearray:
    """The bytes of a piece; raises DamagedError if they are not those that were written."""
    there = os.fstat(file.fileno()).st_size - piece.begin
    data = bytearray(max(0, min(piece.length, there)))
    file.seek(piece.begin)
    if file.readinto(data) != piece.length or checksum(data) != piece.checksum:
        raise damaged(folder, f"a {name} with other bytes than were written, from {piece.begin:,} on")
    return data


def find_damage(folder: Path, manifest: Manifest, names: list[str], contents: bool = True) -> list[str]:
    """What there is instead of the files that were written, a phrase for each. contents=False compares sizes alone."""
    return [wrong for name in names if (wrong := _wrong(folder / name, manifest.files[name], contents))]


def _wrong(path: Path, pieces: tuple[Piece, ...], contents: bool) -> str:
    length = pieces[-1].begin + pieces[-1].length if pieces else 0
    try:
        if not path.exists():
            return f"no {path.name}"
        if not path.is_file():
            return f"a {path.name} that is no file"
        if path.stat().st_size != length:
            return f"a {path.name} of {path.stat().st_size:,} bytes instead of {length:,}"
        if not contents:
            return ""
        with path.open("rb") as file:
            bad = next((piece for piece in pieces if _checksum_of(file, piece.length) != piece.checksum), None)
    except OSError as error:
        return f"a {path.name} that cannot be read ({error.strerror or error})"
    end = bad.begin + bad.length if bad else 0
    return f"a {path.name} with other bytes than were written, between {bad.begin:,} and {end:,}" if bad else ""


def _checksum_of(file: BinaryIO, length: int) -> str:
    """Of the next bytes of a file."""
    found = xxhash.xxh3_64()
    while length > 0 and (data := file.read(min(length, _AT_A_TIME))):
        found.update(data)
        length -= len(data)
    return found.hexdigest()
