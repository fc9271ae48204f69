"""Generated images that need no download: objects of ten classes over random textures, with exact masks.

A class is a shape, for some with a pattern in it. Colors, backgrounds, places, sizes and angles have the same distribution
for all classes. Image i is a pure function of (seed, i, size).
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check, sentence
from .random_numbers import PROCEDURAL, random_uniform
from .stored import MOST_PIXELS, as_ppm

CLASSES = (
    "disk",
    "ring",
    "star",
    "cross",
    "crescent",
    "target",
    "striped square",
    "checkered disk",
    "dotted triangle",
    "ruled hexagon",
)

_MIN_OBJECTS, _MAX_OBJECTS = 3, 4  # per image, all of the image's class, each with its own colors
_NOISE_CELLS, _NOISE_STRENGTHS = (4, 10, 32), (0.3, 0.2, 0.1)  # of each noise: cells per side, range of values
_HALF_SIZE = (0.2, 0.28)  # from an object's center to its rim, in image widths
_TILT = 27 * math.pi / 180  # an object turns by at most this much either way
_DARKNESS = 0.3  # mean of the background
_CHUNK = 64  # images drawn at a time
_OBJECT_FIELDS = 10  # size, distance from the center, angle, fill (3), ink (3), and the first object's direction


class ProceduralSource:
    """`count` images of size x size, drawn at construction (about a thousand per second) and kept as uint8."""

    classes: tuple[str, ...] = CLASSES
    most_pixels = MOST_PIXELS

    def __init__(self, count: int = 4096, size: int = 96, seed: int = 0):
        check(
            count >= 1 and size >= 16,
            "ProceduralSource: count must be positive and size 16 or more",
            f"{count} and {size}",
            "use larger numbers",
        )
        needed, there = count * size * size * 3, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        check(
            needed < there,
            "ProceduralSource: all images must fit in memory",
            f"{count} images of {needed / 2**30:.3g} GiB where there are {there / 2**30:.3g} GiB",
            "lower Data.procedural_images",
        )
        self.count, self.size, self.seed = count, size, seed
        self.fingerprint = f"procedural-1 count={count} size={size} seed={seed}"
        self.labels = labels(seed, np.arange(count))
        self.images = np.empty((count, size, size, 3), np.uint8)
        for first in range(0, count, _CHUNK):
            indices = np.arange(first, min(first + _CHUNK, count))
            self.images[indices] = draw_images(seed, indices, size)[0]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"procedural image {index}"

    def encoded(self, index: int) -> bytes:
        return as_ppm(self.images[index])

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def files(self) -> tuple[()]:
        return ()

    def masks(self, indices: np.ndarray) -> np.ndarray:
        """The objects' masks of some images: [B, size, size] bool."""
        return draw_images(self.seed, np.asarray(indices), self.size)[1]


def labels(seed: int, indices: np.ndarray) -> np.ndarray:
    """Classes [B] int64. Every ten consecutive images hold each class once, in random order."""
    rows = np.arange(len(CLASSES))
    keys = random_uniform(seed, PROCEDURAL, 0, (indices // len(CLASSES))[:, None], rows)  # [B, classes]
    return np.take_along_axis(np.argsort(keys, 1, kind="stable"), (indices % len(CLASSES))[:, None], 1)[:, 0]


def draw_images(seed: int, indices: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, size, size, 3] uint8 and object masks [B, size, size] bool."""
    image = backgrounds(seed, indices, size)
    classes = torch.from_numpy(labels(seed, indices))
    numbers = _uniform(seed, 2, indices, _MAX_OBJECTS * _OBJECT_FIELDS + 1)
    objects, counts = numbers[:, 1:].unflatten(1, (_MAX_OBJECTS, _OBJECT_FIELDS)), numbers[:, 0]
    counts = _MIN_OBJECTS + (counts * (_MAX_OBJECTS - _MIN_OBJECTS + 1)).long()
    mask = torch.zeros(len(indices), size, size, dtype=torch.bool)
    for number in range(_MAX_OBJECTS):
        place = 2 * math.pi * (number / counts + objects[:, 0, -1])  # around the center, so that few overlap
        distance, texture = _object(classes, objects[:, number], place, size)
        distance[number >= counts] = 1.0  # outside everywhere
        cover = (0.5 - distance * size).clamp_(0, 1)[:, None]  # antialiased over one pixel
        fill, ink = colors(objects[:, number, 3:9])
        image = image + (fill + (ink - fill) * texture[:, None] - image) * cover
        mask |= distance < 0
    pixels = (image.clamp_(0, 1) * 255).round_().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy(), mask.numpy()


def _uniform(seed: int, purpose: int, indices: np.ndarray, fields: int) -> Tensor:
    return torch.from_numpy(random_uniform(seed, PROCEDURAL, purpose, indices[:, None], np.arange(fields))).float()


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Pixel centers in [0, 1]: x [1, size], y [size, 1]."""
    line = (torch.arange(size) + 0.5) / size
    return line[None, :], line[:, None]


def backgrounds(seed: int, indices: np.ndarray, size: int) -> Tensor:
    """Colored noise of three scales, [B, 3, size, size]: colors vary within an image as much as between images."""
    cells = [4 * n * n for n in _NOISE_CELLS]
    parts = (_uniform(seed, 1, indices, sum(cells)) - 0.5).split(cells, 1)
    image = torch.full((len(indices), 3, size, size), _DARKNESS)
    for strength, side, part in zip(_NOISE_STRENGTHS, _NOISE_CELLS, parts, strict=True):
        gray, color = part.view(-1, 4, side, side).split([1, 3], 1)
        image += strength * F.interpolate(gray + 0.5 * color, size=(size, size), mode="bicubic")
    return image


def colors(u: Tensor) -> tuple[Tensor, Tensor]:
    """A bright fill and a dark ink of any hue, from u [B, 6]: [B, 3, 1, 1] each."""
    return 0.4 + 0.6 * u[:, :3, None, None], 0.6 * u[:, 3:6, None, None]


def _object(classes: Tensor, u: Tensor, place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """An object per image: signed distance to its outline in image widths, and how much ink covers it, [B, S, S]."""
    half_size = _HALF_SIZE[0] + (_HALF_SIZE[1] - _HALF_SIZE[0]) * u[:, 0]
    off_center = 0.24 + 0.16 * u[:, 1]
    center_x, center_y = 0.5 + off_center * torch.cos(place), 0.5 + off_center * torch.sin(place)
    return object_at(classes, center_x, center_y, half_size, (2 * u[:, 2] - 1) * _TILT, size)


def object_at(
    classes: Tensor, center_x: Tensor, center_y: Tensor, half_size: Tensor, angle: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The same for objects [B] of given classes, centers (in image widths), half sizes and angles."""
    x, y = _grid(size)
    cos, sin = (f(angle)[:, None, None] / half_size[:, None, None] for f in (torch.cos, torch.sin))
    dx, dy = x - center_x[:, None, None], y - center_y[:, None, None]
    right, down = dx * cos + dy * sin, dy * cos - dx * sin  # in units of the object's half size
    distance, ink = torch.empty_like(right), torch.zeros_like(right)
    for number in classes.unique().tolist():
        rows = (classes == number).nonzero()[:, 0]
        distance[rows], ink[rows] = _shape(number, right[rows], down[rows])
    return distance * half_size[:, None, None], ink


def _shape(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | float]:
    """Distance to the outline of a class (negative inside) and its ink, in the object's own coordinates."""
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)

    def polygon(corners: int) -> Tensor:
        wedge = 2 * math.pi / corners
        return radius * torch.cos(torch.remainder(angle + wedge / 2, wedge) - wedge / 2) - math.cos(wedge / 2)

    def square(wave: Tensor) -> Tensor:
        return (wave > 0).float()

    match CLASSES[number]:
        case "disk":
            return radius - 0.85, 0.0
        case "ring":
            return (radius - 0.72).abs() - 0.2, 0.0
        case "star":
            tip = 2 * (torch.remainder(angle * 5 / (2 * math.pi), 1) - 0.5).abs()  # 1 at the tips
            return 0.7 * (radius - 0.48 - 0.52 * tip), 0.0
        case "cross":
            across, along = torch.maximum(x.abs() - 0.95, y.abs() - 0.26), torch.maximum(x.abs() - 0.26, y.abs() - 0.95)
            return torch.minimum(across, along), 0.0
        case "crescent":
            return torch.maximum(radius - 0.95, 0.75 - torch.hypot(x - 0.5, y)), 0.0
        case "target":
            return radius - 0.95, square(torch.cos(13 * radius))
        case "striped square":
            return torch.maximum(x.abs(), y.abs()) - 0.72, square(torch.sin(12 * x))
        case "checkered disk":
            return radius - 0.85, square(torch.sin(9 * x) * torch.sin(9 * y))
        case "dotted triangle":
            return polygon(3) - 0.1, square(torch.cos(12 * x) + torch.cos(12 * y) - 0.7)
        case "ruled hexagon":
            return polygon(6) + 0.05, square(torch.maximum(torch.cos(10 * x), torch.cos(10 * y)) - 0.75)
    rule = f"procedural: the class must be below {len(CLASSES)}"
    raise ValueError(sentence(rule, number, f"use one of {CLASSES}"))
