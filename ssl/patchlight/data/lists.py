"""Text files with one row per line and tabs between fields, in which any name that a file system allows can be written.

A field of ordinary characters stands there as it is. Any other field, and one that begins with a double quote or begins or
ends with a space, is written as a JSON string: in double quotes, with escapes. Spaces around a field are not part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..checks import sentence


def format_row(fields: Sequence[str]) -> str:
    """A line that `read_rows` reads back to the same fields."""
    return "\t".join(_format(field) for field in fields)


def write_rows(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Writes a file with a line per row."""
    path.write_text("".join(f"{format_row(row)}\n" for row in rows), encoding="utf-8", newline="\n")


def read_rows(path: Path) -> list[list[str]]:
    """The fields of every line that is not empty. Bytes that are no UTF-8 are kept as Python keeps them in file names."""
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if line := line.rstrip(" \t\r"):
            rows.append([_parse(field.strip(" "), f"line {number} of {path}") for field in line.split("\t")])
    return rows


def _format(field: str) -> str:
    plain = field.isprintable() and field == field.strip() and not field.startswith('"')
    return field if plain else json.dumps(field)  # which has ASCII characters only


def _parse(field: str, place: str) -> str:
    if not field.startswith('"'):
        return field
    try:
        value = json.loads(field)
    except json.JSONDecodeError:
        rule = "A name that begins with a double quote must be a JSON string"
        raise ValueError(sentence(rule, f"{field!r} in {place}", "write it as json.dumps(name) does")) from None
    return value
