"""Procedural images with true masks in the layouts of ADE20K, PASCAL VOC 2012 and ImageNet-S.

Each part has images of its own: training, validation, and a test split without masks. Class 0 of the masks is the background.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ...checks import check, check_new_folder
from ...data.procedural import CLASSES, ProceduralSource
from ..segment.predictions import as_stored
from ..segment.scenes import ProceduralScenes

_LEAST = len(CLASSES)  # images that hold every class once


def write_ade20k(out: str | Path, images: int = 40, size: int = 96, seed: int = 0) -> Path:
    """Writes `images` training images and a quarter as many for validation and for testing."""
    out = _new_folder(out, images)
    for part, source in zip(("training", "validation", "testing"), _parts(images, size, seed), strict=True):
        for number, image, classes in _scenes(source):
            _save(image, out / "images" / part / f"ADE_{part}_{number:08d}.jpg")
            if part != "testing":
                _save(as_stored(classes, "ade20k"), out / "annotations" / part / f"ADE_{part}_{number:08d}.png")
    return out


def write_voc2012(out: str | Path, images: int = 40, size: int = 96, seed: int = 0) -> Path:
    """Writes `images` training images, which trainaug lists too, and a quarter as many for val and for test."""
    out = _new_folder(out, images)
    for year, (part, source) in enumerate(zip(("train", "val", "test"), _parts(images, size, seed), strict=True), 2007):
        names = []
        for number, image, classes in _scenes(source):
            names.append(f"{year}_{number:06d}")
            _save(image, out / "JPEGImages" / f"{names[-1]}.jpg")
            if part != "test":
                _save(as_stored(classes, "voc2012"), out / "SegmentationClass" / f"{names[-1]}.png")
        for listed in ("train", "trainaug") if part == "train" else (part,):
            path = out / "ImageSets" / "Segmentation" / f"{listed}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(names) + "\n")
    return out


def write_imagenet_s(out: str | Path, images: int = 40, size: int = 96, seed: int = 0) -> Path:
    """Writes `images` labeled training images of ten classes, and a quarter as many for validation and for test."""
    out = _new_folder(out, images)
    for part, source in zip(("train-semi", "validation", "test"), _parts(images, size, seed), strict=True):
        for number, image, classes in _scenes(source):
            name = (
                Path(f"n{source.labels[number]:08d}") / f"{part}_{number:08d}"
            )  # class folders in the order of labels
            _save(image, out / part / f"{name}.JPEG")
            if part != "test":
                _save(as_stored(classes, "imagenet-s"), out / f"{part}-segmentation" / f"{name}.png")
    return out


def _new_folder(out: str | Path, images: int) -> Path:
    out = Path(out)
    check_new_folder("The folder", out)
    rule = f"There must be an image of each of the {_LEAST} classes"
    check(images >= _LEAST, rule, f"{images} images", "use more")
    return out


def _parts(images: int, size: int, seed: int) -> list[ProceduralSource]:
    """Training, validation and test images."""
    counts = images, max(_LEAST, images // 4), max(_LEAST, images // 4)
    return [ProceduralSource(count, size, 3 * seed + part) for part, count in enumerate(counts)]


def _scenes(source: ProceduralSource) -> Iterator[tuple[int, Image.Image, np.ndarray]]:
    """The number, image and classes of each scene."""
    scenes = ProceduralScenes(source)
    for number in range(len(source)):
        scene = scenes.read(number)
        yield number, Image.fromarray(scene.image), scene.classes


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        image.save(path)
    else:
        image.save(path, quality=95, subsampling=0)
