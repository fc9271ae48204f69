"""Data sets for classification: images with classes, in a part for training and a part for testing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import check, sentence
from ...data.lists import read_rows
from ...data.procedural import ProceduralSource
from ...data.sources import DATA_SET, FileList, Files, ImageFolder, open_own
from ...data.stored import Images, Source, Subset
from ...data.streams import ImageStream
from ...file_functions import call_alone, function_of, names_function
from ..images import PROCEDURAL, Unreadable
from ..layouts.annotated import read_cars, read_flowers102, read_inat2019
from ..layouts.cifar import Part, read_cifar

FOLDER = "folder"  # the layout of most data sets: parts that are folders of class folders, or lists
ORIGINALS: dict[str, Callable[[Path], tuple[Part, Part]]] = {  # layouts of data sets as they are downloaded
    "cifar10": lambda root: read_cifar(root, 10),
    "cifar100": lambda root: read_cifar(root, 100),
    "flowers102": read_flowers102,
    "cars": read_cars,
    "inat2019": read_inat2019,
}
LAYOUTS = (FOLDER, *ORIGINALS)
_WHOLE = {  # classes and test images of the whole data sets: published numbers are of these
    "imagenet": (1000, 50_000),
    "cifar10": (10, 10_000),
    "cifar100": (100, 10_000),
    "flowers102": (102, 6149),
    "cars": (196, 8041),
    "inat2019": (1010, 3030),
}


@dataclass(frozen=True)
class LabeledImages(Subset):
    """Some images of a source with their classes."""

    labels: np.ndarray  # [n] int64
    classes: tuple[str, ...]


@dataclass(frozen=True)
class LabeledData:
    """A data set for classification."""

    name: str  # that of a whole data set with published numbers, else the path
    train: LabeledImages
    test: LabeledImages
    whole: bool  # whether test images are used whole: objects reach the border, so nothing may be cut off
    unreadable: Unreadable = field(default_factory=Unreadable)  # images of both parts

    @property
    def class_count(self) -> int:
        return len(self.train.classes)


def open_labeled(path: str, procedural_images: int = 2048, layout: str = FOLDER) -> LabeledData:
    """A folder with train/ and val/ (or test/), each a folder of class folders or a list <name>.txt; the function of a file
    that returns data sets under these names (`my_images.py:both`); or `procedural`. layout: of other folders."""
    if layout != FOLDER:
        return _open_original(path, layout)
    if path == PROCEDURAL:
        drawn = ProceduralSource(procedural_images), ProceduralSource(512, seed=1)
        train, test = (_all_images(source, source.labels, source.classes) for source in drawn)
        return LabeledData(PROCEDURAL, train, test, whole=True)
    root = Path(path)
    if names_function(path):
        parts = call_alone(path, function_of(path, DATA_SET), DATA_SET)
        train, test = _part_of(parts, path, "train"), _part_of(parts, path, "val", "validation", "test")
    else:
        train, test = _open_part(root, "train"), _open_part(root, "val", "test")
    train_only, test_only = set(train.classes) - set(test.classes), set(test.classes) - set(train.classes)
    if train_only or test_only:
        got = (
            f"{len(train_only)} without a test image and {len(test_only)} without a training image in {root}, such as"
            f" {sorted(train_only | test_only)[0]!r}"
        )
        raise ValueError(sentence("Both parts must have the same classes", got, "complete them or take the class out"))
    return LabeledData(_name_of("imagenet", root, train, test), train, test, whole=False)


def _open_original(path: str, layout: str) -> LabeledData:
    """A data set in the layout that it is downloaded in."""
    is_folder, remedy = Path(path).is_dir(), f"pass the folder of {layout} as --data"
    check(is_folder, f"The layout {layout} needs a folder", f"{path!r}, which is none", remedy)
    train, test = (_all_images(*part) for part in ORIGINALS[layout](Path(path)))
    every = set(range(len(train.classes)))
    for title, part in (("training", train), ("test", test)):
        found = set(part.labels.tolist())
        rule, got = "Each label must be the number of a class", f"{sorted(found - every)[:1]} of {len(every)} in {path}"
        check(found <= every, rule, got, "copy the files again")
        missing = sorted(every - found)
        got = f"{len(missing)} without one in {path}, such as {train.classes[missing[0]]!r}" if missing else ""
        check(not missing, f"Every class must have a {title} image", got, "copy the files again")
    return LabeledData(_name_of(layout, Path(path), train, test), train, test, whole=False)


def _name_of(benchmark: str, path: Path, train: LabeledImages, test: LabeledImages) -> str:
    """The benchmark's, if this is the whole of it."""
    return benchmark if (len(train.classes), len(test)) == _WHOLE[benchmark] else str(path)


def _all_images(source: Images, labels: np.ndarray, classes: tuple[str, ...]) -> LabeledImages:
    return LabeledImages(source, np.arange(len(source)), labels, classes)


def _open_part(root: Path, *names: str) -> LabeledImages:
    """The part under the first of the names that exists."""
    for name in names:
        source: Files
        if (root / name).is_dir():
            source = ImageFolder(root / name)
            empty = sorted({p.name for p in (root / name).iterdir() if p.is_dir()} - set(source.classes))
            if empty:
                got = f"{len(empty)} empty folders in {root / name}, such as {empty[0]!r}"
                raise ValueError(sentence("Every class must have an image", got, "fill or remove them"))
        elif (root / f"{name}.txt").is_file():
            source = FileList(root / f"{name}.txt")
        else:
            continue
        if source.labels is None:
            remedy = "sort them into one folder per class, or write a tab and the class after each path of a list"
            raise ValueError(sentence("Images of a labeled data set need classes", f"none in {root / name}", remedy))
        return _all_images(source, source.labels, source.classes)
    rule, got = "A data set must have the parts train and val", f"no {' or '.join(names)} in {root}"
    raise FileNotFoundError(sentence(rule, got, "make folders or lists of these names"))


def _part_of(parts: Any, path: str, *names: str) -> LabeledImages:
    """The data set under the first of the names that exists."""
    found = [name for name in names if isinstance(parts, Mapping) and name in parts]
    got = f"a dict with {', '.join(map(str, parts))}" if isinstance(parts, Mapping) else type(parts).__name__
    remedy = 'return {"train": one, "val": another}'
    check(bool(found), f"{path} must return a dict of data sets with {' or '.join(names)}", got, remedy)
    source = open_own(parts[found[0]])
    if isinstance(source, ImageStream) or source.labels is None:
        rule, got = "Images of a labeled data set need numbers and classes", f"none in {found[0]} of {path}"
        remedy = "give each data set a length, items by number and a list `targets`"
        raise ValueError(sentence(rule, got, remedy))
    return _all_images(source, source.labels, source.classes)


def choose_labels(part: LabeledImages, share: float, names: str = "", seed: int = 0) -> LabeledImages:
    """A share of each class, at least one image, by a fixed draw; or the images of a list, as SimCLR's 1 % and 10 % are.

    names: a text file with one file name per line; order and folders do not matter.
    """
    if names:
        keep = _listed(part, Path(names))
    elif not 0 < share <= 1:
        raise ValueError(sentence("The share of labels must lie in (0, 1]", share, "0.01 and 0.1 are usual"))
    else:
        random = np.random.default_rng(seed)
        rows = [random.permutation(np.flatnonzero(part.labels == c)) for c in range(len(part.classes))]
        keep = np.sort(np.concatenate([row[: max(1, round(share * len(row)))] for row in rows]))
    empty = sorted(set(range(len(part.classes))) - set(part.labels[keep].tolist()))
    if empty:
        got = f"none for {len(empty)} classes, such as {part.classes[empty[0]]!r}"
        raise ValueError(sentence("Every class must keep a label", got, "use a larger share or another list"))
    return LabeledImages(part.source, part.ids[keep], part.labels[keep], part.classes)


def _listed(part: LabeledImages, path: Path) -> np.ndarray:
    """Numbers of the images that a list names."""
    wanted = {Path(row[0]).name for row in read_rows(path)}
    keep = np.array([i for i in range(len(part)) if Path(part.name(i)).name in wanted], dtype=np.int64)
    if len(keep) != len(wanted):
        rule = "Every name of a label list must be among the training images"
        got = f"{len(keep)} of {len(wanted)} in {path}"
        raise ValueError(sentence(rule, got, "pass the list that belongs to this data"))
    return keep


def gallery_and_queries(
    source: Source, seed: int, most_gallery: int, most_queries: int
) -> tuple[LabeledImages, LabeledImages]:
    """Two parts of the images: neighbors in the one classify the other. Of procedural images, no run trains on the other."""
    if isinstance(source, ProceduralSource):
        others = ProceduralSource(most_queries, source.size, seed=source.seed + 1)
        gallery = np.arange(min(len(source), most_gallery))
        return labeled_part(source, gallery), labeled_part(others, np.arange(most_queries))
    order = np.random.default_rng(seed).permutation(len(source))
    held_out = min(most_queries, max(1, len(order) // 5))
    gallery, queries = np.sort(order[held_out:][:most_gallery]), np.sort(order[:held_out])
    return labeled_part(source, gallery), labeled_part(source, queries)


def labeled_part(source: Source, ids: np.ndarray) -> LabeledImages:
    """Some images of a source, with their labels if it has any."""
    labels = np.zeros(0, np.int64) if source.labels is None else np.asarray(source.labels)[ids]
    return LabeledImages(source, ids, labels, source.classes)
