"""Files of JSON lines that a run appends to: damaged lines are put aside and said, never lost and never in the way."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from .outlet import Outlet

_LARGEST = 1e300  # sums and differences of numbers up to here are finite
_MOST_NAMED = 3  # damaged lines in a sentence


def number(value: object) -> float | None:
    """A finite number; None for anything else that a line may hold, and for numbers that nobody measures."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        return None
    return 0.0 if abs(value) < 1 / _LARGEST else float(value)


def parse(raw: bytes, key: str) -> dict | None:
    """The object of a line, which has a count under `key`; None for a damaged line. Zero bytes around it are ignored."""
    try:
        line = json.loads(raw.strip(b"\0\r\n\t ").decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get(key)) is not int or not 0 <= line[key] < 2**63:
        return None
    return line


def read_lines(path: Path, key: str = "step") -> list[dict]:
    """The undamaged lines of a file, none if there is no file; without an unfinished last line, which is being written."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        found = [parse(raw, key) for raw in file if raw.endswith(b"\n")]
    return [line for line in found if line is not None]


def to_bytes(record: Mapping) -> bytes:
    """A record as a line; numbers that JSON does not have become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean).encode() + b"\n"


def append(path: Path, data: bytes) -> None:
    """Adds bytes at the end of a file: all, or with an error none."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def put_aside(path: Path, data: bytes) -> None:
    """Adds bytes at the end of a file on the disk, unless an interrupted attempt has already done so."""
    append(path, b"")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(data)))
        if file.read() != data:
            append(path, data)
        os.fsync(file.fileno())


class LogFile:
    """A file of JSON lines that one process of a run appends to. No error of the file system ends the run."""

    def __init__(self, path: Path, say: Callable[[str], None], key: str = "step") -> None:
        """key: what every line counts, its step or epoch."""
        self.path, self.say, self.key = path, say, key
        self.outlet: Outlet[bytes] = Outlet(path.name, self._write, say)
        self.keep: Callable[[dict], bool] | None = None  # of a rewind that has not been possible yet
        self.written = False

    def add(self, record: Mapping) -> None:
        """Appends a line."""
        self.outlet.put(to_bytes(record))

    def rewind(self, keep: Callable[[dict], bool], visit: Callable[[dict], object] = lambda line: None) -> None:
        """Removes the lines for which `keep` is false, puts damaged bytes aside, and calls `visit` with each line that stays.

        The file is read once, without holding it in memory. If it cannot be changed, that happens before the next line.
        """
        self.keep = keep
        self.outlet.attempt(lambda: self._rewind(visit))

    def _rewind(self, visit: Callable[[dict], object] = lambda line: None) -> None:
        if self.keep is None:
            return
        if self.path.exists():
            with self.path.open("rb") as file:
                changes = Changes(file, self.key, self.keep, visit)
            aside = self.path.with_name(f"{self.path.name}.damaged")
            if changes.damaged:
                put_aside(aside, b"".join(raw.removesuffix(b"\n") + b"\n" for _, raw in changes.damaged))
            changes.apply(self.path)
            if changes.damaged:
                self.say(f"{self.path}: {changes.describe()}, and kept in {aside.name}; the other lines are used.")
            self.written = True
        self.keep = None

    def _write(self, lines: list[bytes]) -> None:
        self._rewind()
        if self.written and not self.path.exists():
            self.say(f"{self.path} was removed while the run writes it: it begins anew.")
            self.written = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, b"".join(lines))
        self.written = True


class Changes:
    """What has to change in a file of JSON lines."""

    def __init__(self, file: BinaryIO, key: str, keep: Callable[[dict], bool], visit: Callable[[dict], object]) -> None:
        self.edits: list[tuple[int, int, bytes]] = []  # start, end, and what takes the place
        self.damaged: list[tuple[int, bytes]] = []  # the number of a line, and its bytes
        position = 0
        for count, raw in enumerate(file, start=1):
            start, position = position, position + len(raw)
            line = parse(raw, key)
            clean = line is not None and raw.endswith(b"\n") and b"\0" not in raw
            if line is None or (not clean and b"\0" in raw):
                self.damaged.append((count, raw))
            if line is None or not keep(line):
                self._edit(start, position, b"")
                continue
            visit(line)
            if not clean:
                self._edit(start, position, raw.strip(b"\0\r\n\t ") + b"\n")
        self.size = position

    def apply(self, path: Path) -> None:
        """Changes the file. A crash leaves the whole old or the whole new one."""
        if not self.edits:
            return
        first, end, replacement = self.edits[0]
        if end == self.size and not replacement:  # the usual case, for which there is room on a full disk too
            with path.open("r+b") as file:
                file.truncate(first)
                os.fsync(file.fileno())
            return
        temporary = path.with_name(f".{path.name}.new")
        try:
            with path.open("rb") as old, temporary.open("wb") as new:
                for start, end, replacement in self.edits:
                    _copy(old, new, start - old.tell())
                    new.write(replacement)
                    old.seek(end)
                shutil.copyfileobj(old, new)
                new.flush()
                os.fsync(new.fileno())
            shutil.copymode(path, temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def describe(self) -> str:
        """Which lines were damaged."""
        named = ", ".join(f"line {number} ({len(raw)} bytes)" for number, raw in self.damaged[:_MOST_NAMED])
        more = len(self.damaged) - _MOST_NAMED
        total = sum(len(raw) for _, raw in self.damaged)
        rest = f" and {more} more, {total} bytes in all," if more > 0 else ""
        return f"{named}{rest} {'was' if len(self.damaged) == 1 else 'were'} damaged"

    def _edit(self, start: int, end: int, replacement: bytes) -> None:
        if self.edits and self.edits[-1][1] == start and not self.edits[-1][2]:
            start = self.edits.pop()[0]
        self.edits.append((start, end, replacement))


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count > 0 and (part := old.read(min(count, 2**20))):
        new.write(part)
        count -= len(part)
