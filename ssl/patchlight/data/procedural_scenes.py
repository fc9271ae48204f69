"""Images with procedural objects of several classes, which hide parts of each other, with the true mask of each object."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check
from .procedural import CLASSES, backgrounds, colors, object_at
from .random_numbers import PROCEDURAL, random_uniform

_MOST, _FIELDS = 4, 11  # single objects per image; random numbers per object
_HALF_SIZE = (0.1, 0.22)  # of single objects, in image widths
_GROUP, _GROUP_HALF_SIZE = 5, 0.055  # objects of a group
_EMPTY, _WITH_GROUP = 10, 5  # of so many images in a row, one is empty, and one has a group
_LEAST_PIXELS = 12  # of an object that counts as visible


@dataclass(frozen=True)
class SceneObject:
    """What can be seen of an object, or of a group of small ones that count together."""

    label: int
    mask: np.ndarray  # [size, size] bool
    group: bool = False


def draw_scene(seed: int, number: int, size: int) -> tuple[np.ndarray, list[SceneObject]]:
    """An image [size, size, 3] uint8 and its objects, from seed and number alone.

    Every tenth image has no object, every fifth a group.
    """
    check(size >= 32, "draw_scene: a scene needs 32 pixels or more", size, "use a larger size")
    u = torch.from_numpy(random_uniform(seed, PROCEDURAL, 5, number, np.arange((_MOST + _GROUP) * _FIELDS + 4))).float()
    scene, single, group = u[:4], u[4 : 4 + _MOST * _FIELDS].view(_MOST, _FIELDS), u[4 + _MOST * _FIELDS :]
    image = backgrounds(seed, np.array([number]), size)[0]
    drawn: list[SceneObject] = []
    if number % _EMPTY != _EMPTY - 1:
        if number % _WITH_GROUP == _WITH_GROUP - 2:
            members = _group(group.view(_GROUP, _FIELDS), scene)
            image, masks = _draw(image, int(scene[1] * len(CLASSES)), members, group.view(_GROUP, _FIELDS), size)
            drawn.append(SceneObject(int(scene[1] * len(CLASSES)), masks.any(0).numpy(), group=True))
        for fields in single[: 1 + int(scene[0] * _MOST)]:
            label = int(fields[0] * len(CLASSES))
            half = _HALF_SIZE[0] + (_HALF_SIZE[1] - _HALF_SIZE[0]) * fields[1]
            place = torch.stack([0.1 + 0.8 * fields[2], 0.1 + 0.8 * fields[3], half])
            image, masks = _draw(image, label, place[None], fields[None], size)
            drawn.append(SceneObject(label, masks[0].numpy()))
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return pixels, _visible(drawn)


def _group(u: Tensor, scene: Tensor) -> Tensor:
    """Centers and half sizes [_GROUP, 3] of small objects around a place."""
    angle = 2 * math.pi * (torch.arange(_GROUP) / _GROUP + scene[2])
    across, down = 0.25 + 0.5 * scene[2], 0.25 + 0.5 * scene[3]
    x, y = across + 0.1 * torch.cos(angle) + 0.02 * u[:, 2], down + 0.1 * torch.sin(angle) + 0.02 * u[:, 3]
    return torch.stack([x, y, torch.full((_GROUP,), _GROUP_HALF_SIZE)], 1)


def _draw(image: Tensor, label: int, places: Tensor, u: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The image with objects of a class over it, and their masks [n, size, size] bool. places [n, 3]: centers, half size."""
    labels, (x, y, half) = torch.full((len(places),), label), places.T
    distance, texture = object_at(labels, x, y, half, (2 * u[:, 4] - 1) * math.pi / 6, size)
    cover = (0.5 - distance * size).clamp(0, 1)[:, None]
    fill, ink = colors(u[:, 5:11])
    painted = fill + (ink - fill) * texture[:, None]
    for layer, opacity in zip(painted, cover, strict=True):
        image = image + (layer - image) * opacity
    return image, distance < 0


def _visible(drawn: list[SceneObject]) -> list[SceneObject]:
    """What later objects leave of earlier ones."""
    found: list[SceneObject] = []
    hidden = np.zeros_like(drawn[0].mask) if drawn else np.zeros(0, bool)
    for thing in reversed(drawn):
        mask = thing.mask & ~hidden
        hidden |= thing.mask
        if mask.sum() >= _LEAST_PIXELS:
            found.append(SceneObject(thing.label, mask, thing.group))
    return found[::-1]
