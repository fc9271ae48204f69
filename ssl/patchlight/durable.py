"""Files that a loss of power leaves whole: their bytes and their names are on the disk before anything relies on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write into, whose bytes are on the disk when the block ends; its name is after `sync_folder`."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing; returns when their names are on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def move(old: Path, new: Path) -> None:
    """Gives a file or folder another name in the same folder; returns when that is on the disk."""
    old.replace(new)
    sync_folder(new.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file at once: a reader, also after a loss of power, gets the whole old content or the whole new one."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with durable_file(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        move(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
