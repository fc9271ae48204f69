"""Images with a class per pixel: ADE20K, PASCAL VOC 2012, ImageNet-S, and the procedural images with their true masks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...checks import check, check_choice, sentence
from ...data.procedural import CLASSES, ProceduralSource
from ...data.stored import EXTENSIONS, decode
from ..images import PROCEDURAL, Unreadable

IGNORE = -1  # the class of pixels that are neither trained on nor scored
Pairs = tuple[tuple[Path, Path, Path], ...]  # a name without suffix, an image and its mask
_ALL_OF_IMAGENET_S = 919  # classes of the largest part, which has no number in its name
LAYOUTS = ("ade20k", "voc2012", "imagenet-s", PROCEDURAL)


@dataclass(frozen=True)
class Scene:
    """An image and its classes."""

    image: np.ndarray  # [H, W, 3] uint8
    classes: np.ndarray  # [H, W] int64, IGNORE where there is none


@dataclass(frozen=True)
class ImageFiles:
    """Images without masks."""

    files: tuple[tuple[Path, Path], ...]  # a name without suffix, and the image

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][1])

    def key(self, index: int) -> Path:
        """The image's name below the folder of all images, without suffix."""
        return self.files[index][0]

    def image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8."""
        path = self.files[index][1]
        try:
            return decode(path.read_bytes())
        except Exception as error:  # a damaged file can raise any exception in a decoder
            raise OSError(sentence("Images must be readable", f"{error} for {path}", "repair it")) from error


@dataclass(frozen=True)
class SceneFiles:
    """Scenes as pairs of files: an image and its mask."""

    pairs: Pairs
    classes_of: Callable[[np.ndarray], np.ndarray]  # classes int64 of a mask as it is stored
    classes: int

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return str(self.pairs[index][1])

    def key(self, index: int) -> Path:
        """The image's name below the folder of all images, without suffix."""
        return self.pairs[index][0]

    def read(self, index: int) -> Scene:
        _, image_path, mask_path = self.pairs[index]
        try:
            image = decode(image_path.read_bytes())
            with Image.open(mask_path) as mask:
                stored = np.array(mask)
        except Exception as error:  # a damaged file can raise any exception in a decoder
            rule = "Images and masks must be readable"
            raise OSError(sentence(rule, f"{error} for {image_path}", "repair it")) from error
        classes = self.classes_of(stored)
        check(
            classes.shape == image.shape[:2],
            "An image and its mask must have one size",
            f"{image.shape[:2]} and {classes.shape} for {mask_path}",
            "resize one of them",
        )
        wrong = classes[(classes < IGNORE) | (classes >= self.classes)]
        got = f"{wrong.max() if wrong.size else 0} in {mask_path}"
        check(not wrong.size, f"Classes must be below {self.classes}", got, "check that the layout fits")
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

    def key(self, index: int) -> Path:
        return Path(f"procedural-{index:05d}")

    def image(self, index: int) -> np.ndarray:
        return self.source.read(index)

    def read(self, index: int) -> Scene:
        mask = self.source.masks(np.array([index]))[0]
        return Scene(self.source.read(index), mask * (self.source.labels[index] + 1))


SceneSource = SceneFiles | ProceduralScenes
UnmaskedSource = ImageFiles | ProceduralScenes


@dataclass(frozen=True)
class Scenes:
    """A data set for segmentation."""

    name: str
    train: SceneSource
    test: SceneSource
    background: bool = False  # whether class 0 is the background
    unreadable: Unreadable = field(default_factory=Unreadable)  # of both parts

    @property
    def classes(self) -> int:
        return self.train.classes

    def check_first(self) -> None:
        """Reads a scene of each part, so that a layout that does not fit is found before training."""
        for part in (self.train, self.test):
            try:
                part.read(0)
            except OSError:  # one damaged file among many: it is replaced or left out, and named
                continue


def open_scenes(layout: str, root: str = "", train_list: str = "train", procedural_images: int = 512) -> Scenes:
    """A data set by its layout; train_list is VOC's list of training images, e.g. trainaug."""
    check_choice("The layout", layout, LAYOUTS)
    path = Path(root)
    if layout == PROCEDURAL:
        counts = procedural_images, max(10, procedural_images // 4)
        train, test = (ProceduralScenes(ProceduralSource(count, seed=seed)) for seed, count in enumerate(counts))
        return Scenes(layout, train, test, background=True)
    name = layout
    if layout == "ade20k":
        parts = [_pair_folders(path / "images" / p, path / "annotations" / p) for p in ("training", "validation")]
        classes_of, classes = _ade20k, 150
    elif layout == "voc2012":
        parts = [_pair_voc(path, listed) for listed in (train_list, "val")]
        classes_of, classes = _voc2012, 21
    else:
        parts = [_pair_folders(path / p, path / f"{p}-segmentation") for p in ("train-semi", "validation")]
        classes_of, classes = _imagenet_s, 1 + len({key.parent for key, _, _ in parts[0]})
        name = "imagenet-s" if classes == 1 + _ALL_OF_IMAGENET_S else f"imagenet-s{classes - 1}"
    train_files, test_files = (SceneFiles(pairs, classes_of, classes) for pairs in parts)
    return Scenes(name, train_files, test_files, background=layout != "ade20k")


def open_unmasked(layout: str, root: str) -> UnmaskedSource:
    """The images of a data set's test split, whose masks only its evaluation server has."""
    path = Path(root)
    if layout == PROCEDURAL:
        return ProceduralScenes(ProceduralSource(10, seed=2))
    if layout == "voc2012":
        listed = path / "ImageSets" / "Segmentation" / "test.txt"
        paths = {Path(n): path / "JPEGImages" / f"{n}.jpg" for n in _listed(listed)}
        where: Path = listed
    else:
        where = path / "images" / "testing" if layout == "ade20k" else path / "test"
        paths = _below(where, EXTENSIONS) if where.is_dir() else {}
    missing = [file for file in paths.values() if not file.is_file()]
    got = f"{len(missing)} missing files, such as {missing[0]}" if missing else f"none in {where}"
    check(bool(paths) and not missing, "The test split must have images", got, "download it or use the split val")
    return ImageFiles(tuple(paths.items()))


def _below(folder: Path, suffixes: Collection[str]) -> dict[Path, Path]:
    """Files below a folder by their names in it, without suffix."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    return {p.relative_to(folder).with_suffix(""): p for p in files}


def _listed(path: Path) -> list[str]:
    """The names of a list of PASCAL VOC."""
    if not path.is_file():
        rule = f"VOC 2012 must list its images in {path}"
        raise FileNotFoundError(sentence(rule, "no such file", "check the path"))
    names = path.read_text().split()
    check(bool(names), "A list of images must name some", f"none in {path}", "download the list again")
    return names


def _pair_folders(images: Path, masks: Path) -> Pairs:
    """Files with equal names below two folders."""
    for folder in (images, masks):
        if not folder.is_dir():
            rule = f"The layout needs a folder {folder.name} in {folder.parent}"
            raise FileNotFoundError(sentence(rule, "none", "check the path"))
    return _pair(_below(images, EXTENSIONS), _below(masks, {".png"}), images, masks)


def _pair_voc(root: Path, name: str) -> Pairs:
    """The images of a list of PASCAL VOC, with masks of the augmented folder where it has them."""
    listed = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    names = _listed(listed)
    folders = [root / "SegmentationClassAug", root / "SegmentationClass"]
    mask_files = {
        Path(n): p for n in names if (p := next((f / f"{n}.png" for f in folders if (f / f"{n}.png").is_file()), None))
    }
    image_files = {Path(n): root / "JPEGImages" / f"{n}.jpg" for n in names}
    return _pair(image_files, mask_files, listed, folders[1])


def _pair(images: dict[Path, Path], masks: dict[Path, Path], images_from: Path, masks_from: Path) -> Pairs:
    missing = [name for name in images if name not in masks]
    if missing or not images:
        got = f"none for {len(missing)} of {len(images)} images of {images_from} in {masks_from}"
        got += f", such as {missing[0]}" if missing else ""
        remedy = "complete the masks or check the layout"
        raise FileNotFoundError(sentence("Every image must have a mask", got, remedy))
    return tuple((name, images[name], masks[name]) for name in images)


def _ade20k(stored: np.ndarray) -> np.ndarray:
    """0 marks pixels of no class."""
    return np.where(stored == 0, IGNORE, stored.astype(np.int64) - 1)


def _voc2012(stored: np.ndarray) -> np.ndarray:
    """255 marks outlines and unclear pixels."""
    return np.where(stored == 255, IGNORE, stored.astype(np.int64))


def _imagenet_s(stored: np.ndarray) -> np.ndarray:
    """Red and green are the low and high byte; 1000 marks unclear pixels, 0 is the class of all other things."""
    check(
        stored.ndim == 3,
        "Masks of ImageNet-S must have colors, whose red and green are the class",
        f"an array of {stored.ndim} dimensions",
        "download the masks again, or check that the layout fits",
    )
    stored = stored.astype(np.int64)
    numbers = stored[..., 0] + 256 * stored[..., 1]
    return np.where(numbers == 1000, IGNORE, numbers)
