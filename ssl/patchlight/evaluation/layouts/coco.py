"""Procedural scenes in COCO layout, with all that real annotations have: crowd regions, empty images, ids with gaps, three
forms of masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import faster_coco_eval.core.mask as coco_mask
import numpy as np
from PIL import Image

from ...checks import check, check_new_folder
from ...data.procedural import CLASSES
from ...data.procedural_scenes import SceneObject, draw_scene
from ...usage import POSITIONAL

CATEGORY_IDS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # of the procedural classes, with gaps, as COCO has them
_LEAST = 4  # test images


def write_coco(out: Annotated[Path, POSITIONAL], images: int = 64, size: int = 128, seed: int = 0) -> Path:
    """Images with several procedural objects, their boxes and masks, in COCO layout.

    Args:
        out: a new folder.
        images: for training; a quarter as many are for testing, 4 at least.
        size: side of an image.
        seed: other seeds give other images.
    """
    out = Path(out)
    check_new_folder("write_coco: the folder", out)
    check(images >= 1, "write_coco: images must be positive", images, "use one or more")
    (out / "annotations").mkdir(parents=True)
    for number, (part, count) in enumerate({"train2017": images, "val2017": max(_LEAST, images // 4)}.items()):
        facts = _write_part(out / part, count, size, 2 * seed + number)
        (out / "annotations" / f"instances_{part}.json").write_text(json.dumps(facts))
    return out


def _write_part(folder: Path, count: int, size: int, seed: int) -> dict:
    """The images of a part, and what its file of annotations says."""
    folder.mkdir()
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(count):
        pixels, objects = draw_scene(seed, number, size)
        name = f"{number:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=95, subsampling=0)
        images.append({"id": number, "file_name": name, "width": size, "height": size})
        for thing in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(thing, len(annotations))})
    categories = [{"id": id, "name": name} for id, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(thing: SceneObject, number: int) -> dict:
    rows, columns = (np.flatnonzero(thing.mask.any(axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "category_id": CATEGORY_IDS[thing.label],
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(thing.mask.sum()),
        "iscrowd": int(thing.group),
        "segmentation": _segmentation(thing, number),
    }


def _segmentation(thing: SceneObject, number: int) -> dict | list:
    """Runs for groups; else polygons, or compressed runs for every third and where there is a hole."""
    size = list(thing.mask.shape)
    if thing.group:
        return {"size": size, "counts": runs_of(thing.mask)}
    polygons = [] if number % 3 == 2 else polygons_of(thing.mask)
    if polygons:
        return polygons
    return {"size": size, "counts": coco_mask.encode(np.asfortranarray(thing.mask, np.uint8))["counts"].decode()}


def runs_of(mask: np.ndarray) -> list[int]:
    """Lengths of runs of 0 and 1 in turns, column by column, beginning with 0."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8)])
    starts = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], starts, [mask.size]])).tolist()


def polygons_of(mask: np.ndarray) -> list[list[int]]:
    """The outlines of a mask along the edges of its pixels, x and y in turns; none if it has a hole."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    sides = {  # a side of a pixel whose neighbor is outside, from its first corner to its second, clockwise
        ((0, 0), (1, 0)): inside & ~padded[:-2, 1:-1],
        ((1, 0), (1, 1)): inside & ~padded[1:-1, 2:],
        ((1, 1), (0, 1)): inside & ~padded[2:, 1:-1],
        ((0, 1), (0, 0)): inside & ~padded[1:-1, :-2],
    }
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for ((x0, y0), (x1, y1)), open_side in sides.items():
        for y, x in np.argwhere(open_side).tolist():
            following.setdefault((x + x0, y + y0), []).append((x + x1, y + y1))
    polygons = []
    while following:
        start = next(iter(following))
        corners, at = [], start
        while True:
            corners.append(at)
            to = following[at].pop()
            if not following[at]:
                del following[at]
            at = to
            if at == start:
                break
        polygons.append(_without_straight(corners))
    return [] if any(_area(polygon) < 0 for polygon in polygons) else [np.ravel(p).tolist() for p in polygons]


def _without_straight(corners: list[tuple[int, int]]) -> np.ndarray:
    """Corners [n, 2] without those between two others on a line."""
    points = np.array(corners)
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _area(points: np.ndarray) -> float:
    """Positive for an outline that runs clockwise on the screen, negative for that of a hole."""
    x, y = points.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
