"""Tells a listener about every call of this process that changes a file below a folder, before and after it happens.

Only calls from Python are seen; `power.check_seen` finds files that something else wrote.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREPARES = ("mkdir", "create", "truncate", "write", "fsync", "rename", "link")  # what a full disk or a quota refuses


@dataclass(frozen=True, slots=True)
class Operation:
    """A call on a file or folder; paths are relative to the watched folder."""

    name: str  # mkdir, create, truncate, write, fsync, rename, link, unlink, rmdir
    path: str
    target: str = ""  # of rename and link
    inode: int = 0
    offset: int = 0
    data: bytes = b""


class Listener:
    """Does nothing; the base of those that kill, refuse or record."""

    def before(self, operation: Operation) -> None:
        """May raise, or end the process."""

    def after(self, operation: Operation) -> None:
        """The call has succeeded."""


class Count(Listener):
    """Calls an action before one operation, the n-th of those whose path begins so."""

    def __init__(self, number: int, action: Callable[[Operation], None], beginning: str = "") -> None:
        self.left, self.action, self.beginning, self.seen = number, action, beginning, 0

    def before(self, operation: Operation) -> None:
        if operation.path.startswith(self.beginning):
            self.seen += 1
            if self.seen == self.left:
                self.action(operation)


class Record(Listener):
    """Appends every operation to a file that several processes share, in the order in which they happen."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def before(self, operation: Operation) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def after(self, operation: Operation | tuple[str, int]) -> None:
        data = pickle.dumps(operation)
        while data:
            data = data[_os["write"](self.file, data) :]
        fcntl.flock(self.file, fcntl.LOCK_UN)

    def note(self, name: str, number: int) -> None:
        """Adds something that is no operation."""
        self.before(Operation(name, ""))
        self.after((name, number))


_os: dict[str, Callable] = {}  # the functions that are replaced
_NAMES = ("open", "write", "fsync", "fdatasync", "ftruncate", "rename", "replace", "link", "unlink", "remove")
_NAMES += ("rmdir", "mkdir", "truncate", "pwrite")


def watch(folder: Path, listener: Listener) -> None:
    """From now on, for the rest of this process."""
    _os.update({name: getattr(os, name) for name in _NAMES})
    _os["io.open"] = io.open
    watcher = _Watcher(str(folder), listener)
    for name in _NAMES:
        setattr(os, name, getattr(watcher, name))
    io.open = builtins.open = watcher.io_open


class _Watcher:
    """The functions of os and io that change files, with a listener."""

    def __init__(self, root: str, listener: Listener) -> None:
        self.root, self.listener, self.lock = os.path.abspath(root), listener, threading.RLock()

    def below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path relative to the root; None if it is outside."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}") if path > 2 else "/dev/null"
        path = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        path = os.path.abspath(path).removesuffix(" (deleted)")
        if path == self.root:
            return "."
        return path[len(self.root) + 1 :] if path.startswith(self.root + os.sep) else None

    def tell(self, operation: Operation, call: Callable[[], Any]) -> Any:
        """Calls between the listener's two methods, one operation of this process at a time."""
        with self.lock:
            self.listener.before(operation)
            try:
                result = call()
            except BaseException:
                if isinstance(self.listener, Record):
                    fcntl.flock(self.listener.file, fcntl.LOCK_UN)
                raise
            if operation.name in ("create", "mkdir"):
                found = (
                    os.fstat(result) if operation.name == "create" else os.stat(os.path.join(self.root, operation.path))
                )
                operation = Operation(operation.name, operation.path, inode=found.st_ino)
            elif operation.name == "write":
                operation = Operation(
                    "write", operation.path, "", operation.inode, operation.offset, operation.data[:result]
                )
            self.listener.after(operation)
            return result

    def open(self, path, flags, mode=0o777, *, dir_fd=None):
        def call():
            return _os["open"](path, flags, mode, dir_fd=dir_fd)

        name = self.below(path, dir_fd) if flags & (os.O_WRONLY | os.O_RDWR) else None
        if name is None:
            return call()
        with self.lock:
            try:
                before = os.stat(path, dir_fd=dir_fd)
            except FileNotFoundError:
                return self.tell(Operation("create", name), call) if flags & os.O_CREAT else call()
            if flags & os.O_TRUNC:
                return self.tell(Operation("truncate", name, inode=before.st_ino), call)
            return call()

    def write(self, fd, data):
        name = self.below(fd)
        if name is None:
            return _os["write"](fd, data)
        return self.written(name, fd, bytes(data), lambda: _os["write"](fd, data))

    def written(self, name: str, fd: int, data: bytes, call: Callable[[], int]) -> int:
        """A write through a file descriptor or a file object."""
        with self.lock:
            found = os.fstat(fd)
            appends = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
            offset = found.st_size if appends else os.lseek(fd, 0, os.SEEK_CUR)
            return self.tell(Operation("write", name, "", found.st_ino, offset, data), call)

    def pwrite(self, fd, data, offset):
        name = self.below(fd)
        if name is None:
            return _os["pwrite"](fd, data, offset)
        operation = Operation("write", name, "", os.fstat(fd).st_ino, offset, bytes(data))
        return self.tell(operation, lambda: _os["pwrite"](fd, data, offset))

    def _of_descriptor(self, call: Callable, name: str, fd, *rest):
        descriptor = fd if isinstance(fd, int) else fd.fileno()
        path = self.below(descriptor)
        if path is None:
            return call(fd, *rest)
        inode, size = os.fstat(descriptor).st_ino, rest[0] if rest else 0
        return self.tell(Operation(name, path, "", inode, size), lambda: call(fd, *rest))

    def fsync(self, fd):
        return self._of_descriptor(_os["fsync"], "fsync", fd)

    def fdatasync(self, fd):
        return self._of_descriptor(_os["fdatasync"], "fsync", fd)

    def ftruncate(self, fd, length):
        return self._of_descriptor(_os["ftruncate"], "truncate", fd, length)

    def truncate(self, path, length):
        if isinstance(path, int):
            return self.ftruncate(path, length)
        name = self.below(path)
        if name is None:
            return _os["truncate"](path, length)
        operation = Operation("truncate", name, "", os.stat(path).st_ino, length)
        return self.tell(operation, lambda: _os["truncate"](path, length))

    def _of_two(self, name: str, operation: str, source, target, options):
        paths = self.below(source, options.get("src_dir_fd")), self.below(target, options.get("dst_dir_fd"))
        if None in paths:
            assert paths == (None, None), f"{name} into or out of the watched folder: {source} {target}"
            return _os[name](source, target, **options)
        return self.tell(Operation(operation, *paths), lambda: _os[name](source, target, **options))

    def rename(self, src, dst, **options):
        return self._of_two("rename", "rename", src, dst, options)

    def replace(self, src, dst, **options):
        return self._of_two("replace", "rename", src, dst, options)

    def link(self, src, dst, **options):
        return self._of_two("link", "link", src, dst, options)

    def _of_path(self, name: str, operation: str, path, *rest, dir_fd=None):
        found = self.below(path, dir_fd)
        if found is None:
            return _os[name](path, *rest, dir_fd=dir_fd)
        return self.tell(Operation(operation, found), lambda: _os[name](path, *rest, dir_fd=dir_fd))

    def unlink(self, path, *, dir_fd=None):
        return self._of_path("unlink", "unlink", path, dir_fd=dir_fd)

    def remove(self, path, *, dir_fd=None):
        return self._of_path("remove", "unlink", path, dir_fd=dir_fd)

    def rmdir(self, path, *, dir_fd=None):
        return self._of_path("rmdir", "rmdir", path, dir_fd=dir_fd)

    def mkdir(self, path, mode=0o777, *, dir_fd=None):
        found = self.below(path, dir_fd)
        if found is None or os.path.lexists(os.path.join(self.root, found)):
            return _os["mkdir"](path, mode, dir_fd=dir_fd)
        return self.tell(Operation("mkdir", found), lambda: _os["mkdir"](path, mode, dir_fd=dir_fd))

    def io_open(
        self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
    ):
        """open(), with a raw file whose writes are seen; reading is left to Python."""
        kinds = set(mode)
        if not kinds & set("wax+") or self.below(file) is None:
            return _os["io.open"](file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _RawFile(self, file, "".join(kinds - set("bt")), closefd, opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered = (io.BufferedRandom if "+" in kinds else io.BufferedWriter)(raw, size)
        if "b" in kinds:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text


class _RawFile(io.FileIO):
    """A file whose writes the watcher sees."""

    def __init__(self, watcher: _Watcher, file, mode: str, closefd: bool, opener) -> None:
        opener = opener or (lambda path, flags: os.open(path, flags, 0o666))
        super().__init__(file, mode, closefd, None if isinstance(file, int) else opener)
        self.watcher, self.path = watcher, watcher.below(self.fileno())

    def write(self, data):
        copy = bytes(data)
        return self.watcher.written(self.path, self.fileno(), copy, lambda: super(_RawFile, self).write(copy))

    def truncate(self, size=None):
        size = self.tell() if size is None else size
        os.ftruncate(self.fileno(), size)
        return size
