"""Sheets of pictures, and label maps drawn over images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

_GAP = 4  # pixels between the pictures of a sheet


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


def tile(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows, with gaps; each row as high as its highest picture, each column as wide as its widest."""
    widths = [max(p.width for p in column) for column in zip(*rows, strict=True)]
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + _GAP * (len(widths) - 1), sum(heights) + _GAP * (len(rows) - 1)), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (sum(widths[:c]) + _GAP * c, sum(heights[:r]) + _GAP * r))
    return sheet
