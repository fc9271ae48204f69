"""Pictures of a segmented video: frames beside each other, and an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.stored import decode
from ..sheets import overlay, tile
from .scores import VOID

_COLUMNS, _WIDTH, _MOST_FRAMES = 5, 256, 60  # of a sheet, pixels of a picture in it, frames of an animation


def save_preview(frames: Sequence[Path], labels: np.ndarray, path: Path) -> None:
    """An animated WebP of frames with their label maps [T, H, W]."""
    every = -(-len(frames) // _MOST_FRAMES)
    pictures = [
        _small(overlay(decode(f.read_bytes()), m)) for f, m in zip(frames[::every], labels[::every], strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80 * every, loop=0, quality=80)


def draw_sheet(frames: Sequence[Path], labels: np.ndarray, truth: np.ndarray | None) -> Image.Image:
    """Some frames in a row; below them the same with the predicted labels, and with the true ones if they are known."""
    numbers = np.unique(np.linspace(0, len(frames) - 1, _COLUMNS).round().astype(int))
    images = [decode(frames[t].read_bytes()) for t in numbers]
    rows = [images, [overlay(i, labels[t]) for i, t in zip(images, numbers, strict=True)]]
    if truth is not None:
        objects = np.where(truth == VOID, 0, truth)
        rows.append([overlay(i, objects[t]) for i, t in zip(images, numbers, strict=True)])
    return tile([[_small(picture) for picture in row] for row in rows])


def _small(image: np.ndarray) -> Image.Image:
    height = round(_WIDTH * image.shape[0] / image.shape[1])
    return Image.fromarray(image).resize((_WIDTH, height), Image.Resampling.BICUBIC)
