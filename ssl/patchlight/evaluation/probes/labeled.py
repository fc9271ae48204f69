"""Images with classes in two parts: one to learn or to remember, one to be judged on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.procedural import ProceduralSource
from ...data.sources import FileList, Files, ImageFolder
from ...data.stored import Source
from ..images import PROCEDURAL

_IMAGENET = (1000, 50_000)  # classes, images of its validation set


@dataclass(frozen=True)
class Subset:
    """Some images of a source, as a source."""

    source: Source
    ids: np.ndarray
    labels: np.ndarray  # [n] int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        return self.source.name(int(self.ids[index]))

    def read(self, index: int) -> np.ndarray:
        return self.source.read(int(self.ids[index]))


@dataclass(frozen=True)
class Labelled:
    """A data set for classification."""

    name: str  # imagenet where it is, else its path
    train: Subset
    test: Subset
    whole: bool  # whether images are shown whole: objects reach the border, so nothing may be cut off

    @property
    def classes(self) -> int:
        return len(self.train.classes)


def open_labelled(path: str, procedural_images: int = 2048) -> Labelled:
    """A folder with train/ and val/ (or test/), each a folder of class folders or a list <name>.txt; or `procedural`."""
    if path == PROCEDURAL:
        train, test = ProceduralSource(procedural_images), ProceduralSource(512, seed=1)
        return Labelled(PROCEDURAL, _all(train, train.labels), _all(test, test.labels), whole=True)
    root = Path(path)
    train, test = _part(root, "train"), _part(root, "val", "test")
    missing, unknown = set(train.classes) - set(test.classes), set(test.classes) - set(train.classes)
    if missing or unknown:
        raise ValueError(
            f"Both parts must have the same classes, got {len(missing)} without a test image and {len(unknown)} without a"
            f" training image in {root}, such as {sorted(missing | unknown)[0]!r}; complete them or take the class out."
        )
    name = "imagenet" if (len(train.classes), len(test)) == _IMAGENET else str(root)
    return Labelled(name, _all(train, train.labels), _all(test, test.labels), whole=False)


def _all(source: Source, labels: np.ndarray) -> Subset:
    return Subset(source, np.arange(len(source)), np.asarray(labels), tuple(source.classes))


def _part(root: Path, *names: str) -> Files:
    for name in names:
        if (root / name).is_dir():
            source = ImageFolder(root / name)
            empty = sorted({p.name for p in (root / name).iterdir() if p.is_dir()} - set(source.classes))
            if empty:
                raise ValueError(
                    f"Every class must have an image, got {len(empty)} empty folders in {root / name}, such as"
                    f" {empty[0]!r}; fill or remove them."
                )
        elif (root / f"{name}.txt").is_file():
            source = FileList(root / f"{name}.txt")
        else:
            continue
        if source.labels is None:
            raise ValueError(
                f"Images need classes here, got none in {root / name}; sort them into one folder per class, or write a tab"
                " and the class after each path of a list."
            )
        return source
    raise FileNotFoundError(
        f"A data set must have the parts train and val, got no {' or '.join(names)} in {root}; make folders or lists of"
        " these names."
    )


def choose_labels(part: Subset, share: float, names: str = "", seed: int = 0) -> Subset:
    """A share of each class, at least one image, by a fixed draw; or the images of a list, as SimCLR's 1 % and 10 % are.

    names: a text file with one file name per line; order and folders do not matter.
    """
    if names:
        wanted = {Path(line).name for line in Path(names).read_text().split()}
        keep = np.array([i for i in range(len(part)) if Path(part.name(i)).name in wanted], dtype=np.int64)
        if len(keep) != len(wanted):
            raise ValueError(
                f"Every name of a label list must be among the training images, got {len(keep)} of {len(wanted)} in {names};"
                " pass the list that belongs to this data."
            )
    elif not 0 < share <= 1:
        raise ValueError(f"The share of labels must lie in (0, 1], got {share}; 0.01 and 0.1 are usual.")
    else:
        random = np.random.default_rng(seed)
        rows = [random.permutation(np.flatnonzero(part.labels == c)) for c in range(len(part.classes))]
        keep = np.sort(np.concatenate([row[: max(1, round(share * len(row)))] for row in rows]))
    empty = sorted(set(range(len(part.classes))) - set(part.labels[keep].tolist()))
    if empty:
        raise ValueError(
            f"Every class must keep a label, got none for {len(empty)} classes, such as {part.classes[empty[0]]!r};"
            " use a larger share or another list."
        )
    return Subset(part.source, part.ids[keep], part.labels[keep], part.classes)
