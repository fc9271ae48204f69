"""Predicted classes as files, in the formats that the data sets' evaluation servers read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...checks import check_new_folder
from ..images import PROCEDURAL
from ..sheets import PALETTE
from .scenes import UnmaskedSource

VAL, TEST = "val", "test"


@dataclass(frozen=True)
class Predictions:
    """Where predictions are written, and of which images: those of the test split, or, where there are none, the scored ones."""

    folder: Path
    layout: str
    images: UnmaskedSource | None = None

    def __post_init__(self) -> None:
        check_new_folder("The folder of predictions", self.folder)

    def save(self, name: Path, classes: np.ndarray) -> Path:
        """Writes classes [H, W] as FOLDER/name.png."""
        path = self.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        as_stored(classes, self.layout).save(path)
        return path


def as_stored(classes: np.ndarray, layout: str) -> Image.Image:
    """Classes [H, W], which are all known, as the layout stores masks.

    ADE20K: class + 1 in gray. VOC: class numbers with VOC's palette. ImageNet-S: the low byte in red, the high one in green.
    """
    if layout == "ade20k":
        return Image.fromarray((classes + 1).astype(np.uint8))
    if layout == "imagenet-s":
        parts = (classes % 256, classes // 256, np.zeros_like(classes))
        return Image.fromarray(np.stack(parts, -1).astype(np.uint8))
    image = Image.fromarray(classes.astype(np.uint8))
    if layout != PROCEDURAL:
        image.putpalette(PALETTE.tobytes())
    return image
