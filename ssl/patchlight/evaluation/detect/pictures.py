"""A sheet of test images with the objects that were found beside those that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faster_coco_eval.core.mask as coco_mask
import numpy as np
from PIL import Image, ImageDraw

from ..sheets import PALETTE, overlay, tile

_WIDTH = 320  # of each picture


@dataclass(frozen=True)
class DrawnObjects:
    """Objects of an image as they are drawn."""

    boxes: np.ndarray  # [n, 4] left, top, right, bottom
    masks: list[dict]  # compressed runs
    captions: list[str]


@dataclass(frozen=True)
class DetectPicture:
    """One test image for a sheet."""

    image: np.ndarray  # [H, W, 3] uint8
    found: DrawnObjects
    true: DrawnObjects


def draw_detections(pictures: Sequence[DetectPicture]) -> Image.Image:
    """A row per image: what was found, what is there."""
    return tile([[_drawn(p.image, p.found), _drawn(p.image, p.true)] for p in pictures])


def _drawn(image: np.ndarray, objects: DrawnObjects) -> Image.Image:
    numbers = np.zeros(image.shape[:2], np.int64)
    for number, mask in enumerate(objects.masks):
        numbers[coco_mask.decode(mask) > 0] = 1 + number % 255
    factor = _WIDTH / image.shape[1]
    picture = Image.fromarray(overlay(image, numbers, 0.45)).resize((_WIDTH, max(1, round(image.shape[0] * factor))))
    pen = ImageDraw.Draw(picture)
    for number, (box, caption) in enumerate(zip(objects.boxes * factor, objects.captions, strict=True)):
        color = tuple(PALETTE[1 + number % 255].tolist())
        left, top, right, bottom = box.tolist()
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color)
        pen.text((left + 2, top + 1), caption, fill="white", stroke_width=1, stroke_fill="black")
    return picture
