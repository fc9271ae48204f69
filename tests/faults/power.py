"""What a file system may hold after a power cut: a model of data and directory entries, fed with recorded operations.

What was not fsynced may be kept, lost, cut short or be zeros; entries of a directory that was not fsynced may be old or new.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from faults.file_operations import Operation


@dataclass
class File:
    """The bytes that survive, and the changes since."""

    synced: bytes = b""
    changes: list[tuple[int, bytes | None]] = field(default_factory=list)  # at an offset; None cuts off what follows

    def contents(self, changes: list[tuple[int, bytes | None]]) -> bytes:
        data = bytearray(self.synced)
        for offset, added in changes:
            if added is None:
                del data[offset:]
                data.extend(bytes(offset - len(data)))
            else:
                data.extend(bytes(max(0, offset - len(data))))
                data[offset : offset + len(added)] = added
        return bytes(data)

    def after_cut(self, rng: np.random.Generator) -> bytes:
        """One of the contents that are possible after a power cut."""
        kind = rng.choice(["kept", "lost", "short", "zeros"])
        if kind == "kept" or not self.changes:
            return self.contents(self.changes)
        if kind == "lost":
            return self.synced
        if kind == "zeros":  # the size was written, the data not
            return self.contents(
                [(offset, None if data is None else bytes(len(data))) for offset, data in self.changes]
            )
        some = self.changes[: rng.integers(len(self.changes) + 1)]
        if some and some[-1][1]:
            offset, data = some[-1]
            some = [*some[:-1], (offset, data[: rng.integers(len(data) + 1)])]
        return self.contents(some)


Node = File | dict[str, "Node"]  # a dict is a folder: what it holds for a reader before the cut


class Disk:
    """Files and folders as programs see them, and the changes of folders that are not on the disk yet."""

    def __init__(self) -> None:
        self.now: dict = {}
        self.files: dict[int, File] = {}  # by inode
        self.synced: dict[int, dict] = {id(self.now): {}}  # entries that survive, by the identity of their folder
        self.pending: list[tuple[tuple[dict, str, object], ...]] = []  # entries that change together; None removes

    def folder(self, path: str) -> tuple[dict, str]:
        """The folder that holds a path, and the last part of its name."""
        at, parts = self.now, Path(path).parts
        for part in parts[:-1]:
            at = at[part]
        return at, parts[-1] if parts else "."

    def change(self, *entries: tuple[dict, str, object]) -> None:
        """Changes entries of folders, together."""
        for folder, name, node in entries:
            if node is None:
                folder.pop(name, None)  # something unseen may have made it; `differences` tells
            else:
                folder[name] = node
        self.pending.append(entries)

    def apply(self, operation: Operation) -> None:
        """An operation of the run."""
        if operation.path == ".":
            if operation.name == "fsync":
                self.sync(self.now)
            return
        folder, name = self.folder(operation.path)
        match operation.name:
            case "mkdir":
                new: dict = {}
                self.synced[id(new)] = {}
                self.change((folder, name, new))
            case "create":
                self.files[operation.inode] = File()
                self.change((folder, name, self.files[operation.inode]))
            case "unlink" | "rmdir":
                self.change((folder, name, None))
            case "rename" | "link":
                other, target = self.folder(operation.target)
                node = folder[name]
                moved = [(folder, name, None)] if operation.name == "rename" else []
                self.change((other, target, node), *moved)
            case "truncate":
                self.files[operation.inode].changes.append((operation.offset, None))
            case "write":
                self.files[operation.inode].changes.append((operation.offset, operation.data))
            case "fsync" if isinstance(folder.get(name), dict):
                self.sync(folder[name])
            case "fsync":
                file = self.files[operation.inode]
                file.synced, file.changes = file.contents(file.changes), []

    def sync(self, folder: dict) -> None:
        """fsync of a folder: its entries survive."""
        done = [entries for entries in self.pending if any(at is folder for at, _, _ in entries)]
        self.pending = [entries for entries in self.pending if entries not in done]
        _write(self.synced, done)

    def after_cut(self, rng: np.random.Generator) -> dict:
        """One of the trees that are possible after a power cut: folders are dicts, files are bytes."""
        synced = {key: dict(entries) for key, entries in self.synced.items()}
        if rng.random() < 0.5:  # in order, as a journal keeps them
            kept = self.pending[: rng.integers(len(self.pending) + 1)]
        else:
            kept = [entries for entries in self.pending if rng.random() < 0.5]
        _write(synced, kept)

        def tree(node):
            if isinstance(node, File):
                return node.after_cut(rng)
            return {name: tree(inside) for name, inside in synced[id(node)].items()}

        return tree(self.now)

    def without_cut(self) -> dict:
        """The tree as programs see it."""

        def tree(node):
            if isinstance(node, File):
                return node.contents(node.changes)
            return {name: tree(inside) for name, inside in node.items()}

        return tree(self.now)


def _write(synced: dict[int, dict], changes) -> None:
    for entries in changes:
        for folder, name, node in entries:
            if node is None:
                synced[id(folder)].pop(name, None)
            else:
                synced[id(folder)][name] = node


def read_record(path: Path) -> list[Operation | tuple[str, int]]:
    """The operations that `file_operations.Record` wrote."""
    found = []
    with path.open("rb") as file:
        while True:
            try:
                found.append(pickle.load(file))
            except EOFError:
                return found


def write_tree(tree: dict, folder: Path) -> None:
    """Makes the files of a tree."""
    folder.mkdir(parents=True)
    for name, node in tree.items():
        if isinstance(node, dict):
            write_tree(node, folder / name)
        else:
            (folder / name).write_bytes(node)


def differences(tree: dict, folder: Path) -> list[str]:
    """Files of a folder that are not as in the tree: something wrote them that no listener saw."""
    there = {path.name for path in folder.iterdir()}
    wrong = [str(folder / name) for name in sorted(there ^ tree.keys())]
    for name in sorted(there & tree.keys()):
        path, node = folder / name, tree[name]
        if isinstance(node, dict):
            wrong += differences(node, path)
        elif path.read_bytes() != node:
            wrong.append(str(path))
    return wrong
