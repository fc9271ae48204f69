"""CIFAR-10 and CIFAR-100 as they are downloaded: the binary files, or those for Python, of which no code is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import sentence
from ...data.stored import Images

Part = tuple[Images, np.ndarray, tuple[str, ...]]  # images, labels [n] int64, names of classes

SIDE = 32
_PIXELS = 3 * SIDE**2
# By the number of classes: folders of the archives, the files of both parts and of the names, how many labels an image
# has in the binary files (the last one counts), and keys in the files for Python.
BINARY = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}
_PYTHON = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
FILES = {10: ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]), 100: (["train"], ["test"])}
NAMES = {10: ("batches.meta.txt", "batches.meta"), 100: ("fine_label_names.txt", "meta")}
LABELS = {10: 1, 100: 2}
_KEYS = {10: (b"labels", b"label_names"), 100: (b"fine_labels", b"fine_label_names")}


class SmallImages:
    """Images [n, 32, 32, 3] uint8 in memory, named by their place in a file."""

    def __init__(self, files: list[Path], images: list[np.ndarray]) -> None:
        self.files, self.images = files, np.concatenate(images)
        self.ends = np.cumsum([len(part) for part in images])

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return f"image {index - int(self.ends[number - 1] if number else 0)} of {self.files[number]}"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


def read_cifar(root: Path, classes: int) -> tuple[Part, Part]:
    """The training and the test part; root: the unpacked folder, or the one that it is in."""
    folders = (root / BINARY[classes], root / _PYTHON[classes], root)
    ends = {".bin": _read_binary, "": _read_python}
    test = FILES[classes][1][0]
    found = ((folder, end) for folder in folders for end in ends if (folder / f"{test}{end}").is_file())
    folder, end = next(found, (None, ""))
    if folder is None:
        rule, got = f"CIFAR-{classes} must have its files", f"neither {test}.bin nor {test} in {root}"
        raise FileNotFoundError(sentence(rule, got, f"unpack its archive there, which makes {BINARY[classes]}"))
    names = _read_names(folder, classes, binary=end == ".bin")
    parts = []
    for files in FILES[classes]:
        paths = [folder / f"{name}{end}" for name in files]
        labels, images = zip(*(ends[end](path, classes) for path in paths), strict=True)
        parts.append((SmallImages(paths, list(images)), np.concatenate(labels), names))
    return parts[0], parts[1]


def _read_names(folder: Path, classes: int, binary: bool) -> tuple[str, ...]:
    path = folder / NAMES[classes][0 if binary else 1]
    if binary:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    names = read_pickle(path).get(_KEYS[classes][1])
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise _damaged(path, f"no list {_KEYS[classes][1].decode()}")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _read_binary(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and images of a file of records: one or two labels, then red, green and blue by rows."""
    record = LABELS[classes] + _PIXELS
    data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % record:
        raise _damaged(path, f"{len(data)} bytes where an image has {record}")
    rows = data.reshape(-1, record)
    return rows[:, LABELS[classes] - 1].astype(np.int64), _as_images(rows[:, LABELS[classes] :])


def _read_python(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content, key = read_pickle(path), _KEYS[classes][0]
    labels, pixels = content.get(key), content.get(b"data")
    if not isinstance(labels, list) or not all(type(label) is int and label >= 0 for label in labels):
        raise _damaged(path, f"no list {key.decode()} of numbers")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise _damaged(path, f"no data [n, {_PIXELS}]")
    if len(labels) != len(pixels):
        raise _damaged(path, f"{len(labels)} labels of {len(pixels)} images")
    return np.array(labels, np.int64), _as_images(pixels)


def _as_images(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _damaged(path: Path, reason: str) -> ValueError:
    rule = "A file of CIFAR must be whole, as it was downloaded"
    return ValueError(sentence(rule, f"{path} ({reason})", "unpack the archive again"))


def read_pickle(path: Path) -> dict[Any, Any]:
    """The dict in a pickle of plain values and arrays of uint8. Whatever else it names is refused, not imported."""
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
        content = {name: _array(value) if isinstance(value, _Array) else value for name, value in content.items()}
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises errors of any type
        raise _damaged(path, " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__) from None
    # Python 3 writes texts as str, Python 2, which made the originals, as bytes.
    return {name.encode() if isinstance(name, str) else name: _as_bytes(value) for name, value in content.items()}


def _as_bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [part.encode() if isinstance(part, str) else part for part in value]
    return value


class _Array:
    """What a pickle says of an array: numpy itself never sees it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Type:
    """What a pickle says of a type of numbers."""

    def __init__(self, name: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and the like, which single bytes do not have


def _array(recorded: _Array) -> np.ndarray:
    _, shape, kind, by_columns, data = recorded.state
    if not isinstance(kind, _Type) or kind.name not in ("u1", b"u1") or by_columns:
        raise ValueError("an array that is not of uint8 by rows")
    return np.frombuffer(data, np.uint8).reshape(shape)


_KNOWN = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): lambda name, *_: _Type(name),
    ("_codecs", "encode"): lambda text, *_: text.encode("latin-1"),
} | {(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")}


class _PlainUnpickler(pickle.Unpickler):
    """Knows the names that arrays are pickled with, and takes stand-ins for them."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(f"it names {module}.{name}, which is neither a plain value nor an array")
        return _KNOWN[module, name]
