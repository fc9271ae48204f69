"""Label maps over pictures: frames beside each other, and an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.stored import decode
from .davis_scores import VOID

_GAP, _COLUMNS, _WIDTH, _MOST_FRAMES = 4, 5, 256, 60  # of a sheet, pixels of a picture in it, frames of an animation


def _palette() -> np.ndarray:
    """The colors of label maps [256, 3] uint8, as PASCAL VOC and DAVIS have them: the label's bits, spread over three bytes."""
    label, colors = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (((label >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colors


PALETTE = _palette()


def overlay(image: np.ndarray, labels: np.ndarray, strength: float = 0.55) -> np.ndarray:
    """An image [H, W, 3] uint8 with each object [H, W] in its color and a bright outline."""
    covered = labels > 0
    out = image.astype(np.float32)
    out[covered] += (PALETTE[labels[covered]] - out[covered]) * strength
    edges = _edges(labels)
    out[edges] = out[edges] * 0.25 + 255 * 0.75
    return out.round().astype(np.uint8)


def _edges(labels: np.ndarray) -> np.ndarray:
    padded = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
    return (labels != padded[:-1, 1:]) | (labels != padded[1:, :-1])


def save_preview(frames: Sequence[Path], labels: np.ndarray, path: Path) -> None:
    """An animated WebP of frames with their label maps [T, H, W]."""
    every = -(-len(frames) // _MOST_FRAMES)
    shown = [_small(overlay(decode(f.read_bytes()), m)) for f, m in zip(frames[::every], labels[::every], strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=80 * every, loop=0, quality=80)


def draw_sheet(frames: Sequence[Path], labels: np.ndarray, truth: np.ndarray | None) -> Image.Image:
    """Some frames in a row, as they are, as predicted, and as they truly are, if that is known."""
    numbers = np.unique(np.linspace(0, len(frames) - 1, _COLUMNS).round().astype(int))
    images = [decode(frames[t].read_bytes()) for t in numbers]
    rows = [images, [overlay(i, labels[t]) for i, t in zip(images, numbers, strict=True)]]
    if truth is not None:
        known = np.where(truth == VOID, 0, truth)
        rows.append([overlay(i, known[t]) for i, t in zip(images, numbers, strict=True)])
    return tile([[_small(picture) for picture in row] for row in rows])


def tile(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows, with gaps; each row as high as its highest picture, each column as wide as its widest."""
    widths = [max(p.width for p in column) for column in zip(*rows, strict=True)]
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + _GAP * (len(widths) - 1), sum(heights) + _GAP * (len(rows) - 1)), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (sum(widths[:c]) + _GAP * c, sum(heights[:r]) + _GAP * r))
    return sheet


def _small(image: np.ndarray) -> Image.Image:
    height = round(_WIDTH * image.shape[0] / image.shape[1])
    return Image.fromarray(image).resize((_WIDTH, height), Image.Resampling.BICUBIC)
