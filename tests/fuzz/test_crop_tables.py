"""Crop tables of random policies for images of any size: boxes inside the images, rows that depend on their image alone."""

import numpy as np
import torch
from fuzz.rounds import fuzz

from patchlight.data.policy import CropPolicy, CropSpec, sample_crops
from patchlight.data.torchvision_loader import cut

FIELDS = ("box", "flip", "brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize")


def policy(rng: np.random.Generator) -> CropPolicy:
    def specs(least: int) -> tuple[CropSpec, ...]:
        size = int(rng.integers(1, 40))
        return tuple(spec(size) for _ in range(rng.integers(least, 3)))

    def spec(size: int) -> CropSpec:
        low, high = np.sort(10.0 ** rng.uniform(-4, 0, 2))
        narrow, wide = np.sort(10.0 ** rng.uniform(-2, 2, 2))
        return CropSpec(int(rng.integers(1, 4)), size, (low, high), (narrow, wide), flip=rng.random())

    return CropPolicy(specs(1), specs(0), specs(0))


def sizes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Of images from 1 x 1 on, some of them very long."""
    return np.maximum(1, (10.0 ** rng.uniform(-0.5, rng.choice([1, 2, 5]), (count, 2))).astype(np.int64))


def test_boxes_lie_inside_and_rows_depend_on_their_image_alone():
    def attempt(rng: np.random.Generator) -> None:
        crops, count = policy(rng), int(rng.integers(1, 9))
        seed, epoch = (int(number) for number in rng.integers(0, 2**31, 2))
        ids, shapes = rng.integers(0, 2**40, count), sizes(rng, count)
        whole = sample_crops(crops, seed, epoch, ids, shapes)
        part = rng.permutation(count)[: rng.integers(1, count + 1)]
        again = sample_crops(crops, seed, epoch, ids[part], shapes[part])
        for kind, table in whole.items():
            x, y, w, h = np.moveaxis(table.box, -1, 0)
            assert (w >= 1).all() and (h >= 1).all() and (x >= 0).all() and (y >= 0).all()
            assert (x + w <= shapes[:, 0]).all() and (y + h <= shapes[:, 1]).all()
            for name in FIELDS:
                assert np.array_equal(getattr(table, name)[:, part], getattr(again[kind], name)), name

    assert fuzz(attempt) >= 1


def test_crops_of_any_image_have_their_size():
    def attempt(rng: np.random.Generator) -> None:
        crops, shapes = policy(rng), np.minimum(sizes(rng, 2), 3000)
        images = [rng.integers(0, 256, (min(h, 10**6 // w), w, 3), dtype=np.uint8) for w, h in shapes]
        table = sample_crops(crops, 0, 0, np.arange(2), np.array([(i.shape[1], i.shape[0]) for i in images]))
        for rows in table.values():
            out = torch.full((*rows.flip.shape, rows.size, rows.size, 3), 255, dtype=torch.uint8)
            cut([np.zeros_like(image) for image in images], rows, out)
            assert not out.any(), "every pixel is written"
            cut(images, rows, out)

    assert fuzz(attempt) >= 1
