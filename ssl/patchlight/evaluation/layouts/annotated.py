"""Layouts whose images are files and whose labels are in a file of their own: Flowers-102, Stanford Cars, iNaturalist 2019."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import check, sentence
from ...data.sources import Files
from .cifar import Part
from .mat_file import read_mat

FLOWERS = ("jpg", "imagelabels.mat", "setid.mat")
CARS = ("cars_train", "cars_test", "devkit/cars_train_annos.mat", "devkit/cars_meta.mat")
CAR_TESTS = "cars_test_annos_withlabels.mat"  # beside these, or in devkit/
INAT = ("train2019.json", "val2019.json")


def read_flowers102(root: Path) -> tuple[Part, Part]:
    """Training and validation images together are the training part, as in fine-tuning (iBOT); the test part is its own."""
    root = _folder_with(FLOWERS, root, "flowers-102")
    labels = _numbers(read_mat(root / FLOWERS[1]), "labels", root / FLOWERS[1])
    sets = read_mat(root / FLOWERS[2])
    trained, validated, tested = (_numbers(sets, name, root / FLOWERS[2]) for name in ("trnid", "valid", "tstid"))
    parts = []
    for ids in (np.concatenate([trained, validated]), tested):
        right = ids.min(initial=1) >= 1 and ids.max(initial=1) <= len(labels)
        rule, got = "setid.mat must number the images of imagelabels.mat", f"{ids.max(initial=0)} of {len(labels)}"
        check(bool(right), rule, got, f"copy both files of {root} again")
        names = [f"jpg/image_{number:05d}.jpg" for number in ids]
        classes = tuple(str(number) for number in range(1, int(labels.max()) + 1))
        parts.append(_part(root, names, labels[ids - 1] - 1, classes))
    return parts[0], parts[1]


def read_cars(root: Path) -> tuple[Part, Part]:
    """The files of the development kit, and the annotations of the test images, which came later."""
    root = _folder_with(CARS, root, "stanford_cars")
    test = next((path for path in (root / CAR_TESTS, root / "devkit" / CAR_TESTS) if path.is_file()), None)
    if test is None:
        rule, got = "The test images of Stanford Cars need their classes", f"no {CAR_TESTS} in {root}"
        raise FileNotFoundError(sentence(rule, got, "put it there; devkit/cars_test_annos.mat has no classes"))
    names = read_mat(root / CARS[3]).get("class_names")
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
    check(whole, f"{root / CARS[3]} must have the names of the classes", "no class_names", "copy it again")
    assert names is not None
    parts = []
    for folder, path in ((CARS[0], root / CARS[2]), (CARS[1], test)):
        try:
            rows = [(row["fname"], int(np.asarray(row["class"]).item())) for row in read_mat(path)["annotations"]]
        except (KeyError, TypeError, ValueError) as error:
            rule, got = f"{path.name} must have annotations with fname and class", f"{type(error).__name__} in {path}"
            raise ValueError(sentence(rule, got, "copy it again")) from error
        files = [f"{folder}/{Path(name).name}" for name, _ in rows]
        parts.append(_part(root, files, np.array([number for _, number in rows], np.int64) - 1, tuple(names)))
    return parts[0], parts[1]


def read_inat2019(root: Path) -> tuple[Part, Part]:
    """Training and validation images of the challenge of 2019; its test images have no labels."""
    root = _folder_with(INAT, root, "inat2019")
    train, val = (_read_annotations(root / name) for name in INAT)
    numbers = {key: number for number, key in enumerate(sorted(train[2]))}
    parts = []
    for (names, keys, _), path in zip((train, val), INAT, strict=True):
        unknown = sorted(set(keys) - set(numbers))
        rule = f"Each image of {path} must be of a category of {INAT[0]}"
        check(not unknown, rule, f"category {unknown[:1]} in {root}", "copy both files again")
        labels = np.array([numbers[key] for key in keys], np.int64)
        parts.append(_part(root, names, labels, tuple(train[2][key] for key in numbers)))
    return parts[0], parts[1]


def _read_annotations(path: Path) -> tuple[list[str], list[int], dict[int, str]]:
    """File names, the category of each, and the categories' names, of a file in COCO's form."""
    try:
        content = json.loads(path.read_bytes())
        files = {row["id"]: str(row["file_name"]) for row in content["images"]}
        categories = {int(row["id"]): str(row["name"]) for row in content["categories"]}
        pairs = [(row["image_id"], int(row["category_id"])) for row in content["annotations"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        rule, got = f"{path.name} must have images, annotations and categories", f"{missing} in {path}"
        raise ValueError(sentence(rule, got, "copy it again")) from error
    of_image = dict(pairs)
    got = f"{len(pairs)} annotations of {len(of_image)} images, where there are {len(files)}, in {path}"
    rule = "Each image must have one annotation"
    check(len(pairs) == len(of_image) and of_image.keys() == files.keys(), rule, got, "copy it again")
    return list(files.values()), [of_image[key] for key in files], categories


def _folder_with(names: tuple[str, ...], root: Path, folder: str) -> Path:
    """The folder that has these files: the root, or the one that archives and other libraries make in it."""
    missing = [name for name in names if not (root / name).exists()]
    if not missing:
        return root
    if all((root / folder / name).exists() for name in names):
        return root / folder
    rule, got = f"The folder must have {', '.join(names)}", f"no {missing[0]} in {root}"
    raise FileNotFoundError(sentence(rule, got, "check the path, and unpack what is missing"))


def _numbers(variables: dict[str, Any], name: str, path: Path) -> np.ndarray:
    """A variable as a list of whole numbers."""
    values = variables.get(name)
    whole = isinstance(values, np.ndarray) and values.size > 0 and bool((values == values.round()).all())
    check(whole, f"{path} must have whole numbers {name}", type(values).__name__, "copy it again")
    assert isinstance(values, np.ndarray)
    return values.ravel(order="F").astype(np.int64)


def _part(root: Path, names: list[str], labels: np.ndarray, classes: tuple[str, ...]) -> Part:
    return Files([root / name for name in names], names, None), labels, classes
