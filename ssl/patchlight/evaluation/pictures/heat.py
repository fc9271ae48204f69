"""Values as colors from dark to light."""

from __future__ import annotations

import numpy as np
from PIL import Image

_COLORS = np.array([[0.05, 0.03, 0.2], [0.45, 0.1, 0.43], [0.85, 0.25, 0.3], [0.98, 0.6, 0.2], [0.99, 0.98, 0.7]])


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 as colors [..., 3] in 0..1."""
    places = np.linspace(0, 1, len(_COLORS))
    return np.stack([np.interp(values, places, _COLORS[:, channel]) for channel in range(3)], -1)


def heat_picture(values: np.ndarray) -> Image.Image:
    """Numbers [H, W], cut off at 0 and 1, as a picture."""
    return to_picture(heat_colors(values.clip(0, 1)))


def to_picture(values: np.ndarray) -> Image.Image:
    """Colors [H, W, 3] in 0..1 as a picture."""
    return Image.fromarray((values * 255).round().astype(np.uint8))
