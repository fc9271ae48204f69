"""Images with a class per pixel: ADE20K, PASCAL VOC 2012, ImageNet-S, and the procedural images with their true masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.procedural import CLASSES, ProceduralSource
from ...data.stored import EXTENSIONS, decode
from ..images import PROCEDURAL

IGNORE = -1  # a pixel that is neither learned nor scored
LAYOUTS = ("ade20k", "voc2012", "imagenet-s", PROCEDURAL)


@dataclass(frozen=True)
class Scene:
    """An image and its classes."""

    image: np.ndarray  # [H, W, 3] uint8
    classes: np.ndarray  # [H, W] int64, IGNORE where there is none


@dataclass(frozen=True)
class SceneFiles:
    """Pairs of files."""

    pairs: tuple[tuple[Path, Path], ...]
    decode: Callable[[np.ndarray], np.ndarray]  # a mask as stored -> classes int64
    classes: int

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])

    def read(self, index: int) -> Scene:
        image_path, mask_path = self.pairs[index]
        try:
            image = decode(image_path.read_bytes())
            with Image.open(mask_path) as mask:
                stored = np.array(mask)
        except (OSError, ValueError) as error:
            raise OSError(f"Images and masks must be readable, got {error} for {image_path}; repair it.") from error
        classes = self.decode(stored)
        if classes.shape != image.shape[:2]:
            raise ValueError(
                f"An image and its mask must have one size, got {image.shape[:2]} and {classes.shape} for {mask_path};"
                " resize one of them."
            )
        if classes.max(initial=IGNORE) >= self.classes or classes.min(initial=IGNORE) < IGNORE:
            raise ValueError(
                f"Classes must be below {self.classes}, got {classes.max()} in {mask_path}; check that the layout fits."
            )
        return Scene(image, classes)


@dataclass(frozen=True)
class ProceduralScenes:
    """Class 0 is the background, class c + 1 an object of the image's class c."""

    source: ProceduralSource
    classes: int = len(CLASSES) + 1

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int) -> Scene:
        mask = self.source.masks(np.array([index]))[0]
        return Scene(self.source.read(index), mask * (self.source.labels[index] + 1))


SceneSource = SceneFiles | ProceduralScenes


@dataclass(frozen=True)
class Scenes:
    """A data set for segmentation."""

    name: str
    train: SceneSource
    test: SceneSource

    @property
    def classes(self) -> int:
        return self.train.classes


def open_scenes(layout: str, root: str = "", train_list: str = "train", procedural_images: int = 512) -> Scenes:
    """A data set by its layout; train_list is VOC's list to learn from, e.g. trainaug."""
    if layout == PROCEDURAL:
        parts = (ProceduralSource(procedural_images), ProceduralSource(max(10, procedural_images // 4), seed=1))
        return Scenes(PROCEDURAL, *(ProceduralScenes(part) for part in parts))
    path = Path(root)
    if layout == "ade20k":
        parts = [_folders(path / "images" / p, path / "annotations" / p) for p in ("training", "validation")]
        return Scenes(layout, *(SceneFiles(pairs, _ade20k, 150) for pairs in parts))
    if layout == "voc2012":
        return Scenes(layout, *(SceneFiles(_voc(path, name), _voc2012, 21) for name in (train_list, "val")))
    if layout == "imagenet-s":
        parts = [_folders(path / p, path / f"{p}-segmentation") for p in ("train-semi", "validation")]
        classes = 1 + len({image.parent.name for image, _ in parts[0]})
        return Scenes(layout, *(SceneFiles(pairs, _imagenet_s, classes) for pairs in parts))
    raise ValueError(f"The layout must be one of {', '.join(LAYOUTS)}, got {layout!r}; pick one of them.")


def _folders(images: Path, masks: Path) -> tuple[tuple[Path, Path], ...]:
    """Pairs of files with equal names below two folders."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"The layout asks for {folder.name} in {folder.parent}, got none; check the path.")
    found = {
        p.relative_to(images).with_suffix(""): p for p in sorted(images.rglob("*")) if p.suffix.lower() in EXTENSIONS
    }
    truths = {p.relative_to(masks).with_suffix(""): p for p in sorted(masks.rglob("*.png"))}
    return _paired(found, truths, images, masks)


def _voc(root: Path, name: str) -> tuple[tuple[Path, Path], ...]:
    listed = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"VOC 2012 must list its images in {listed}, got no such file; check the path.")
    names = listed.read_text().split()
    folders = [root / "SegmentationClassAug", root / "SegmentationClass"]
    truths = {
        Path(n): p for n in names if (p := next((f / f"{n}.png" for f in folders if (f / f"{n}.png").is_file()), None))
    }
    found = {Path(n): root / "JPEGImages" / f"{n}.jpg" for n in names}
    return _paired(found, truths, listed, folders[1])


def _paired(images: dict, masks: dict, where: Path, there: Path) -> tuple[tuple[Path, Path], ...]:
    missing = [name for name in images if name not in masks]
    if missing or not images:
        raise FileNotFoundError(
            f"Every image must have a mask, got none for {len(missing)} of {len(images)} images of {where} in {there}"
            f"{f', such as {missing[0]}' if missing else ''}; complete the masks or check the layout."
        )
    return tuple((images[name], masks[name]) for name in images)


def _ade20k(stored: np.ndarray) -> np.ndarray:
    """0 is what belongs to no class."""
    return np.where(stored == 0, IGNORE, stored.astype(np.int64) - 1)


def _voc2012(stored: np.ndarray) -> np.ndarray:
    """255 marks outlines and what is unclear."""
    return np.where(stored == 255, IGNORE, stored.astype(np.int64))


def _imagenet_s(stored: np.ndarray) -> np.ndarray:
    """Red and green are the low and high byte; 1000 is what is unclear, 0 what is of no class."""
    stored = stored.astype(np.int64)
    numbers = stored[..., 0] + 256 * stored[..., 1]
    return np.where(numbers == 1000, IGNORE, numbers)
