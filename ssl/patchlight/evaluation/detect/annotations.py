"""COCO's layout: images with boxes, classes and masks, and what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...checks import check, sentence
from ...data.stored import MOST_PIXELS, decode
from ..images import PROCEDURAL, Unreadable
from ..layouts.coco import write_coco
from .masks import check_mask, decoded_masks, encoded_mask

PARTS = ("train2017", "val2017")
PROCEDURAL_IMAGES, PROCEDURAL_SIZE = 120, 96
_COCO = (80, 5000)  # categories and test images of COCO itself


@dataclass(frozen=True)
class Objects:
    """What is annotated in an image."""

    boxes: np.ndarray  # [n, 4] left, top, right, bottom
    classes: np.ndarray  # [n] int64, from 0
    crowd: np.ndarray  # [n] bool: a region of many objects, which is neither trained on nor a mistake to find
    areas: np.ndarray  # [n]
    masks: tuple[bytes, ...]  # as the file has them, in JSON: one object each, so that workers do not copy them


@dataclass(frozen=True)
class CocoImage:
    """An image, its size as the file of annotations has it, and its objects."""

    id: int
    path: Path
    height: int
    width: int
    objects: Objects

    def read(self) -> np.ndarray:
        """[height, width, 3] uint8."""
        try:
            image = decode(self.path.read_bytes())
        except Exception as error:  # a damaged file can raise any exception in a decoder
            raise OSError(sentence("Images must be readable", f"{error} for {self.path}", "repair it")) from error
        rule, got = "An image must have the size that its annotations name", f"{image.shape[1]} x {image.shape[0]}"
        remedy = "repair one of them"
        check((self.height, self.width) == image.shape[:2], rule, f"{got}, not {self.width} x {self.height}", remedy)
        return image

    def masks(self) -> list[dict]:
        """The masks of its objects as compressed runs."""
        return [encoded_mask(json.loads(mask), self.height, self.width) for mask in self.objects.masks]

    def decoded_masks(self) -> np.ndarray:
        """The masks of its objects, [n, height, width] uint8."""
        return decoded_masks(self.masks(), self.height, self.width)


@dataclass(frozen=True)
class CocoPart:
    """The images of a part, in the order of their ids."""

    images: tuple[CocoImage, ...]
    category_ids: tuple[int, ...]  # of the classes, as the file has them
    class_names: tuple[str, ...]
    notes: tuple[str, ...]  # what was left out or changed, counted

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.images[index].path)


@dataclass(frozen=True)
class CocoData:
    """A data set for detection."""

    name: str
    train: CocoPart  # images with an object to train on
    test: CocoPart
    unreadable: Unreadable = field(default_factory=Unreadable)  # of both parts

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.train.notes, *self.test.notes)


@contextmanager
def open_coco(root: str) -> Iterator[CocoData]:
    """A data set in COCO layout, or the procedural one, which is drawn into a folder of its own for this time."""
    if root != PROCEDURAL:
        yield read_coco(root)
        return
    with TemporaryDirectory() as folder:
        yield read_coco(str(write_coco(Path(folder) / PROCEDURAL, PROCEDURAL_IMAGES, PROCEDURAL_SIZE)))


def read_coco(root: str) -> CocoData:
    """The two parts of a folder in COCO layout."""
    train, test = (read_part(Path(root), part) for part in PARTS)
    same = (train.category_ids, train.class_names) == (test.category_ids, test.class_names)
    got = f"{len(train.category_ids)} and {len(test.category_ids)} categories that differ"
    check(same, "Both parts of a data set must have the same categories", got, "use the annotations of one data set")
    kept = tuple(image for image in train.images if (~image.objects.crowd).any())
    check(len(kept) > 0, "Training needs an image with objects", f"none of {len(train)} in {root}", "check its JSON")
    left_out = len(train) - len(kept)
    notes = (f"{left_out} of {len(train)} images of {PARTS[0]} have no object to train on and are left out",)
    train = CocoPart(kept, train.category_ids, train.class_names, (*train.notes, *(notes if left_out else ())))
    is_coco = (len(test.category_ids), len(test)) == _COCO
    return CocoData("coco" if is_coco else Path(root).name, train, test)


def read_part(root: Path, part: str) -> CocoPart:
    """One part: its file of annotations, its folder of images. What cannot be used is left out and counted."""
    path, folder = root / "annotations" / f"instances_{part}.json", root / part
    facts = _read_json(path)
    check(folder.is_dir(), f"COCO's layout needs a folder {part} in {root}", "none", "check the path")
    given = [row.get("id") for row in facts["categories"]]
    whole = all(map(_is_whole, given)) and 0 < len(set(given)) == len(given)
    check(whole, f"Categories of {path} must have different whole numbers as ids", given[:20], "correct them")
    categories = sorted((row["id"], str(row.get("name", row["id"]))) for row in facts["categories"])
    ids = tuple(id for id, _ in categories)
    reader = _Reader(part, {id: number for number, id in enumerate(ids)})
    images = reader.read(folder, facts)
    check(len(images) > 0, f"{path} must list images", "none that can be used", "check the file")
    return CocoPart(images, ids, tuple(name for _, name in categories), reader.notes())


def _read_json(path: Path) -> dict[str, list[dict]]:
    if not path.is_file():
        rule = f"COCO's layout needs a file {path.name} in {path.parent}"
        raise FileNotFoundError(sentence(rule, "none", "check the path"))
    rule, remedy = f"{path} must be COCO's JSON with images, annotations and categories", "download it again"
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(sentence(rule, " ".join(str(error).split()), remedy)) from error
    for name in ("images", "annotations", "categories"):
        rows = facts.get(name) if isinstance(facts, dict) else None
        right = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        check(right, rule, f"no list of {name}", remedy)
    return facts


class _Reader:
    """Takes what can be used from a part's annotations, and counts the rest by its reason."""

    def __init__(self, part: str, classes: dict[int, int]) -> None:
        self.part, self.classes = part, classes
        self.reasons: dict[str, list[str]] = {}

    def notes(self) -> tuple[str, ...]:
        """A sentence per reason, with its first case."""
        return tuple(f"{self.part}: {len(cases)} {why}: {cases[0]}" for why, cases in sorted(self.reasons.items()))

    def read(self, folder: Path, facts: dict[str, list[dict]]) -> tuple[CocoImage, ...]:
        known: dict[int, dict] = {}
        for row in facts["images"]:
            if why := _wrong_image(row, known):
                self.add(f"images are left out as {why}", f"{row.get('file_name')}, id {row.get('id')}")
            else:
                known[row["id"]] = row
        by_image: dict[int, list[dict]] = {id: [] for id in known}
        for row in facts["annotations"]:
            size = known.get(row["image_id"]) if _is_whole(row.get("image_id")) else None
            if why := self.wrong(row, size):
                self.add(f"annotations are left out as {why}", f"annotation {row.get('id')}")
            else:
                by_image[row["image_id"]].append(row)
        return tuple(
            CocoImage(id, folder / row["file_name"], row["height"], row["width"], self.objects(by_image[id], row))
            for id, row in sorted(known.items())
        )

    def add(self, why: str, case: str) -> None:
        self.reasons.setdefault(why, []).append(case)

    def wrong(self, row: dict, image: dict | None) -> str:
        """Why an annotation cannot be used; empty if it can. The image is the one that it names, if there is one."""
        if image is None:
            return "they name no image of the file"
        if not _is_whole(row.get("category_id")) or row["category_id"] not in self.classes:
            return "they name no category of the file"
        box = row.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(_is_finite(number) for number in box)):
            return "they have no box of four numbers"
        left, top, right, bottom = _clipped(box, image)
        if right <= left or bottom <= top:
            return "nothing of their boxes is inside the image"
        return check_mask(row.get("segmentation"), image["height"], image["width"])

    def objects(self, rows: list[dict], image: dict) -> Objects:
        boxes = np.array([_clipped(row["bbox"], image) for row in rows], np.float64).reshape(-1, 4)
        for row, box in zip(rows, boxes, strict=True):
            x, y, width, height = row["bbox"]
            if np.abs(np.array([x, y, x + width, y + height]) - box).max() > 1:
                self.add("boxes are cut as they reach out of their image", f"annotation {row.get('id')}")
        classes = np.array([self.classes[row["category_id"]] for row in rows], np.int64)
        crowd = np.array([bool(row.get("iscrowd", 0)) for row in rows], bool)
        areas = np.array([row["area"] if isinstance(row.get("area"), int | float) else row["bbox"][2] * row["bbox"][3]
                          for row in rows], np.float64)  # fmt: skip
        return Objects(boxes, classes, crowd, areas, tuple(json.dumps(row["segmentation"]).encode() for row in rows))


def _wrong_image(row: dict, known: dict[int, dict]) -> str:
    sizes: list[Any] = [row.get("width"), row.get("height")]
    if not _is_whole(row.get("id")) or not isinstance(row.get("file_name"), str):
        return "they have no id or no file name"
    if not all(_is_whole(side) and side > 0 for side in sizes):
        return "they have no width or no height"
    if row["width"] * row["height"] > MOST_PIXELS:
        return f"they have more than {MOST_PIXELS} pixels"
    return "another has their id" if row["id"] in known else ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _clipped(box: list[Any], image: dict) -> tuple[float, float, float, float]:
    """The part of a box (left, top, width, height) in an image, as left, top, right, bottom."""
    left, top, width, height = box
    right, bottom = min(left + width, image["width"]), min(top + height, image["height"])
    return max(left, 0), max(top, 0), right, bottom
