"""MATLAB's files of version 5 to 7 as far as data sets use them: numbers, texts, cells and structs. Nothing is executed."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import sentence

_HEADER, _VERSION = 128, 0x0100
_MOST_BYTES, _DEEPEST = 2**28, 8  # of a variable that is stored compressed; of cells in cells
_COMPRESSED, _MATRIX = 15, 14  # types of elements
_CELL, _STRUCT, _CHAR = 1, 2, 4  # classes of arrays; those of numbers follow
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8", 16: "u1"}
_NUMBERS = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_UTF8 = 16

Value = (
    Any  # numbers: an array; a text: str; a cell array: a list; an array of structs: a list of dicts, both by columns
)


def read_mat(path: Path) -> dict[str, Value]:
    """The variables of a file by name."""
    data = path.read_bytes()
    try:
        order = {b"IM": "<", b"MI": ">"}[data[_HEADER - 2 : _HEADER]]
        version = struct.unpack(order + "H", data[_HEADER - 4 : _HEADER - 2])[0]
        if version != _VERSION:
            raise ValueError(f"version {version:#x}")
        return dict(_read_variables(data[_HEADER:], order))
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, struct.error, zlib.error) as error:
        rule, got = "A .mat file must be whole and of MATLAB's version 5 to 7", f"{path} ({_reason(error)})"
        raise ValueError(sentence(rule, got, "copy it again, or save it with -v7")) from error


def _reason(error: Exception) -> str:
    return "no header of such a file" if isinstance(error, KeyError) else str(error).rstrip(".") or type(error).__name__


def _read_variables(data: bytes, order: str) -> list[tuple[str, Value]]:
    elements, found = _Elements(data, order), []
    while not elements.at_end():
        kind, content = elements.take()
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            kind, content = _Elements(unpacker.decompress(content, _MOST_BYTES), order).take()
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} among the variables")
        found.append(_read_matrix(content, order))
    return found


class _Elements:
    """The elements of some bytes, one after the other: a type and a content each."""

    def __init__(self, data: bytes, order: str) -> None:
        self.data, self.order, self.place = data, order, 0

    def at_end(self) -> bool:
        return self.place >= len(self.data)

    def take(self) -> tuple[int, bytes]:
        kind, size = struct.unpack_from(self.order + "II", self.data, self.place)
        start = self.place + 8
        if kind >> 16:  # at most four bytes, beside the type
            kind, size, start = kind & 0xFFFF, kind >> 16, self.place + 4
        end = start + size
        if end > len(self.data) or (start == self.place + 4 and size > 4):
            raise ValueError(f"it ends early: an element of {size} bytes")
        small, padded = start == self.place + 4, size if kind == _COMPRESSED else -(-size // 8) * 8
        self.place = self.place + 8 if small else start + padded
        return kind, self.data[start:end]

    def numbers(self) -> np.ndarray:
        kind, content = self.take()
        return np.frombuffer(content, self.order + _TYPES[kind])

    def matrix(self, depth: int) -> Value:
        kind, content = self.take()
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} in place of an array")
        return _read_matrix(content, self.order, depth)[1]


def _read_matrix(data: bytes, order: str, depth: int = 0) -> tuple[str, Value]:
    """Name and value of an array."""
    if not data:  # an empty cell
        return "", np.empty((0, 0))
    if depth > _DEEPEST:
        raise ValueError(f"arrays in more than {_DEEPEST} others")
    elements = _Elements(data, order)
    kind = int(elements.numbers()[0]) & 0xFF
    shape = tuple(elements.numbers().tolist())
    count, name = math.prod(shape), elements.take()[1].decode("latin-1")
    if min(shape, default=-1) < 0 or count > len(data):
        raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
    if kind == _CELL:
        return name, [elements.matrix(depth + 1) for _ in range(count)]
    if kind == _STRUCT:
        length, names = int(elements.numbers()[0]), elements.take()[1]
        pieces = [names[at : at + length] for at in range(0, len(names), max(1, length))]
        fields = [piece.split(b"\0")[0].decode("latin-1") for piece in pieces]
        return name, [{field: elements.matrix(depth + 1) for field in fields} for _ in range(count)]
    if kind == _CHAR:
        type_, content = elements.take()
        letters = (
            content.decode("utf-8")
            if type_ == _UTF8
            else "".join(map(chr, np.frombuffer(content, order + _TYPES[type_]).tolist()))
        )
        return name, letters
    if kind not in _NUMBERS:
        raise ValueError(f"{name or 'an array'} of class {kind}, which is none of numbers, texts, cells and structs")
    values = elements.numbers()
    return name, values.astype(_NUMBERS[kind]).reshape(shape, order="F")


def write_mat(path: Path, variables: Mapping[str, Value]) -> None:
    """Writes such a file; arrays are of uint8, uint16 or float64."""
    text = b"MATLAB 5.0 MAT-file".ljust(_HEADER - 4)
    packed = (zlib.compress(_matrix(name, value)) for name, value in variables.items())
    content = b"".join(struct.pack("<II", _COMPRESSED, len(part)) + part for part in packed)
    path.write_bytes(text + struct.pack("<H", _VERSION) + b"IM" + content)


def _element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")


def _matrix(name: str, value: Value) -> bytes:
    """An array as an element."""
    shape: tuple[int, ...] = (1, len(value))
    if isinstance(value, str):
        kind, rest = _CHAR, _element(4, value.encode("utf-16-le"))
    elif isinstance(value, np.ndarray):
        of_type = next(number for number, name_ in _TYPES.items() if name_ == value.dtype.str[1:])
        kind = next(number for number, name_ in _NUMBERS.items() if name_ == value.dtype.str[1:])
        shape, rest = value.shape, _element(of_type, value.tobytes(order="F"))
    elif value and isinstance(value[0], Mapping):
        names = b"".join(field.encode().ljust(32, b"\0") for field in value[0])
        kind, rest = _STRUCT, _element(5, struct.pack("<i", 32)) + _element(1, names)
        rest += b"".join(_matrix("", part) for record in value for part in record.values())
    else:
        kind, rest = _CELL, b"".join(_matrix("", part) for part in value)
    head = _element(6, struct.pack("<II", kind, 0)) + _element(5, struct.pack(f"<{len(shape)}i", *shape))
    return _element(_MATRIX, head + _element(1, name.encode()) + rest)
