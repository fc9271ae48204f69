"""Writes procedural images in the layouts of labeled data sets, so that readers and commands can be tried without a download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ...checks import check_least, check_new_folder
from ...data.procedural import CLASSES, ProceduralSource
from ...durable import make_folder
from .annotated import CAR_TESTS, CARS, FLOWERS, INAT
from .cifar import BINARY, FILES, LABELS, NAMES, SIDE
from .mat_file import write_mat


def write_folder(out: Path, images: int = 64, size: int = 96, seed: int = 0) -> Path:
    """train/ and val/ with a folder per class; val has a quarter of the images."""
    for name, source in zip(("train", "val"), _drawn(out, images, size, seed), strict=True):
        for number, label in enumerate(source.labels):
            _save(out / name / CLASSES[label].replace(" ", "_") / f"{number:05d}.png", source.images[number])
    return out


def write_cifar10(out: Path, images: int = 64, size: int = SIDE, seed: int = 0) -> Path:
    """CIFAR-10's binary files. size: of the drawings, which are reduced to 32 x 32."""
    return _write_cifar(out, 10, images, size, seed)


def write_cifar100(out: Path, images: int = 64, size: int = SIDE, seed: int = 0) -> Path:
    """CIFAR-100's binary files, with ten classes. size: of the drawings, which are reduced to 32 x 32."""
    return _write_cifar(out, 100, images, size, seed)


def _write_cifar(out: Path, classes: int, images: int, size: int, seed: int) -> Path:
    folder = out / BINARY[classes]
    for files, source in zip(FILES[classes], _drawn(out, images, size, seed), strict=True):
        for path, numbers in zip(files, np.array_split(np.arange(len(source)), len(files)), strict=True):
            make_folder(folder)
            records = b"".join(
                bytes([int(source.labels[n])] * LABELS[classes]) + _small(source.images[n]).transpose(2, 0, 1).tobytes()
                for n in numbers
            )
            (folder / f"{path}.bin").write_bytes(records)
    (folder / NAMES[classes][0]).write_text("\n".join(CLASSES) + "\n")
    return out


def _small(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def write_flowers102(out: Path, images: int = 64, size: int = 96, seed: int = 0) -> Path:
    """Flowers-102's pictures and its two .mat files, with ten classes; every other training image is of its part `valid`."""
    train, test = _drawn(out, images, size, seed)
    for number, (image, _) in enumerate(_both(train, test), start=1):
        _save(out / FLOWERS[0] / f"image_{number:05d}.jpg", image)
    labels = [label + 1 for _, label in _both(train, test)]
    write_mat(out / FLOWERS[1], {"labels": np.array([labels], np.uint8)})
    numbers, count = np.arange(1, len(labels) + 1, dtype=np.uint16), len(train)
    parts = {"trnid": numbers[:count:2], "valid": numbers[1:count:2], "tstid": numbers[count:]}
    write_mat(out / FLOWERS[2], {name: part[None] for name, part in parts.items()})
    return out


def write_cars(out: Path, images: int = 64, size: int = 96, seed: int = 0) -> Path:
    """Stanford Cars' pictures and the files of its development kit, with ten classes."""
    for folder, path, source in zip(CARS[:2], (CARS[2], CAR_TESTS), _drawn(out, images, size, seed), strict=True):
        rows = []
        for number, label in enumerate(source.labels, start=1):
            name = f"{number:05d}.jpg"
            _save(out / folder / name, source.images[number - 1])
            corners = dict(zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), (1, 1, size, size), strict=True))
            row = {key: np.array([[value]], np.uint16) for key, value in corners.items()}
            rows.append(row | {"class": np.array([[label + 1]], np.uint8), "fname": name})
        make_folder((out / path).parent)
        write_mat(out / path, {"annotations": rows})
    write_mat(out / CARS[3], {"class_names": list(CLASSES)})
    return out


def write_inat2019(out: Path, images: int = 64, size: int = 96, seed: int = 0) -> Path:
    """iNaturalist 2019's pictures and its two files of annotations, with ten classes."""
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    first = 0
    for path, source in zip(INAT, _drawn(out, images, size, seed), strict=True):
        ids = range(first, first := first + len(source))
        files = [f"train_val2019/Shapes/{label}/{key:06d}.jpg" for key, label in zip(ids, source.labels, strict=True)]
        for name, image in zip(files, source.images, strict=True):
            _save(out / name, image)
        pairs = [{"id": key, "image_id": key, "category_id": int(c)} for key, c in zip(ids, source.labels, strict=True)]
        rows = [{"id": key, "file_name": name} for key, name in zip(ids, files, strict=True)]
        (out / path).write_text(json.dumps({"images": rows, "annotations": pairs, "categories": categories}))
    return out


def _drawn(out: Path, images: int, size: int, seed: int) -> tuple[ProceduralSource, ProceduralSource]:
    """Images of a training and of a test part; the second has a quarter as many, and both have every class."""
    check_least("The number of training images", images, len(CLASSES), "every class needs one")
    check_new_folder("The folder", out)
    make_folder(out)
    return ProceduralSource(images, size, seed), ProceduralSource(max(len(CLASSES), images // 4), size, seed + 1)


def _both(*sources: ProceduralSource) -> Iterator[tuple[np.ndarray, int]]:
    for source in sources:
        yield from zip(source.images, source.labels.tolist(), strict=True)


def _save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        Image.fromarray(image).save(path, quality=95, subsampling=0)
    else:
        Image.fromarray(image).save(path)
