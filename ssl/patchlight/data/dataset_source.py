"""A data set of the user's own as a source: anything with a length, whose items are images by number."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..checks import check
from .items import image_in, read_image
from .reading import WrongItem, describe_error
from .stored import MOST_PIXELS, as_ppm, read_file

_SAMPLED = 8  # items whose bytes are part of a fingerprint


@runtime_checkable
class NumberedItems(Protocol):
    """What torch calls a map-style data set; also a list, or a Dataset of the package datasets."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """An item that `items.image_in` takes."""


class DatasetSource:
    """The images of a map-style data set. It is read in processes, never in threads, as torch's DataLoader does it."""

    def __init__(self, dataset: NumberedItems, most_pixels: int = MOST_PIXELS):
        self.dataset, self.most_pixels, self.title = dataset, most_pixels, type(dataset).__name__
        self.count = len(dataset)
        check(self.count > 0, f"{self.title}: at least one image is needed", "none", "pass a data set with images")
        self.labels, self.classes = labels_of(dataset, self.count)
        own = next(
            (f for n in ("fingerprint", "_fingerprint") if isinstance(f := getattr(dataset, n, None), str)), None
        )
        self.fingerprint = _hash(f"{self.title} {self.count}", *([own] if own else self._sample()))

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"item {index} of {self.title}"

    def read(self, index: int) -> np.ndarray:
        return read_image(image_in(self.dataset[index], self.name(index)), self.most_pixels)

    def encoded(self, index: int) -> bytes:
        image = image_in(self.dataset[index], self.name(index))
        image = read_file(image, self.most_pixels) if isinstance(image, Path) else image
        return image if isinstance(image, bytes) else as_ppm(read_image(image, self.most_pixels))

    def files(self) -> tuple[()]:
        return ()

    def _sample(self) -> list[str]:
        """Hashes of some items; none if they change from reading to reading."""
        numbers = np.unique(np.linspace(0, self.count - 1, _SAMPLED).round().astype(int)).tolist()
        first, second = ([self._hash_of(number) for number in numbers] for _ in range(2))
        if first == second:
            return first
        warnings.warn(
            f"{self.title}: its items change from reading to reading, so a run that is resumed sees other images than one"
            " that was never stopped; leave random transforms out, as loaders crop and change colors"
        )
        return []

    def _hash_of(self, number: int) -> str:
        try:
            return _hash(self.encoded(number))
        except WrongItem:
            raise
        except Exception as error:  # it is replaced when a loader meets it
            return describe_error(error)


def labels_of(dataset: Any, count: int) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Classes [n] int64 and their names, where the data set tells them without reading images; else None."""
    indices = getattr(dataset, "indices", None)
    if hasattr(dataset, "dataset") and indices is not None and len(indices) == count:  # torch's Subset
        labels, classes = labels_of(dataset.dataset, len(dataset.dataset))
        return (None if labels is None else labels[np.asarray(indices)]), classes
    listed, names = _listed(dataset)
    if listed is None or not hasattr(listed, "__len__") or len(listed) != count:
        return None, ()
    try:
        labels = np.asarray(listed[:])
    except (TypeError, ValueError):  # of several lengths
        labels = np.empty(0, object)
    kind = labels.dtype.kind
    if labels.shape != (count,) or kind not in "biuU" or (kind == "i" and labels.min() < 0):
        rule = "labels that are whole numbers from 0 on or names, one per image"
        warnings.warn(f"{type(dataset).__name__}: no classes are used, as it has no {rule}")
        return None, ()
    if kind != "U" and isinstance(names, list | tuple) and labels.max() < len(names):
        return labels.astype(np.int64), tuple(map(str, names))
    found, numbers = np.unique(labels, return_inverse=True)
    return numbers.astype(np.int64), tuple(map(str, found))


def _listed(dataset: Any) -> tuple[Any, Any]:
    """What a data set lists as labels, and as names of classes; None where it does not."""
    columns, features = getattr(dataset, "column_names", None), getattr(dataset, "features", None)
    if isinstance(columns, list) and isinstance(features, Mapping) and "label" in columns:  # of the package datasets
        return dataset["label"], getattr(features["label"], "names", None)
    targets = getattr(dataset, "targets", None)
    return getattr(dataset, "labels", None) if targets is None else targets, getattr(dataset, "classes", None)


def _hash(*parts: str | bytes) -> str:
    content = hashlib.sha256()
    for part in parts:
        content.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    return content.hexdigest()[:16]
