"""Predictions for whole scenes: of the image as a whole, or from overlapping windows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from ..encoder import autocast
from .crops import side_lengths
from .heads import resized
from .model import Segmenter
from .protocols import WHOLE, SegmentProtocol

_MOST_SCORES = 1 << 27  # floats of one image's class scores that are enlarged at a time


@torch.no_grad()
def predict(
    model: Segmenter, image: np.ndarray, protocol: SegmentProtocol, device: torch.device, precision: str
) -> np.ndarray:
    """The class of every pixel [H, W] int64: scores at the test size, of overlapping windows their mean, are enlarged."""
    sides = side_lengths(image.shape[:2], protocol.test_short_side, protocol.long_side)
    pixels = v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), list(sides))
    pixels = model.encoder.normalize(pixels.to(device)[None])
    height, width = sides
    patch, crop = model.encoder.patch_size, max(sides) if protocol.test == WHOLE else protocol.crop
    total: Tensor | None = None
    count = torch.zeros(height, width, device=device)
    for y in window_starts(height, crop, protocol.stride):
        for x in window_starts(width, crop, protocol.stride):
            window = pixels[..., y : y + crop, x : x + crop]
            rows, columns = window.shape[-2:]
            with autocast(device, precision):
                scores = model(window)[0]
            scores = resized(scores.float(), (rows + -rows % patch, columns + -columns % patch))[0, :, :rows, :columns]
            if total is None:
                total = scores.new_zeros(len(scores), height, width)
            total[:, y : y + rows, x : x + columns] += scores
            count[y : y + rows, x : x + columns] += 1
    assert total is not None  # there is at least one window
    return best_class(total / count, (image.shape[0], image.shape[1])).cpu().numpy()


def window_starts(side: int, crop: int, stride: int) -> list[int]:
    """First pixels of windows that cover a side; the last window ends with it."""
    return sorted({min(start, max(0, side - crop)) for start in range(0, max(1, side - crop + stride), stride)})


def best_class(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class [H, W] of scores [C, h, w] enlarged to a size. Memory is bounded: some classes at a time."""
    at_once = max(1, _MOST_SCORES // (size[0] * size[1]))
    best, winner = resized(scores[None, :at_once], size)[0].max(0)
    for first in range(at_once, len(scores), at_once):
        value, index = resized(scores[None, first : first + at_once], size)[0].max(0)
        better = value > best
        best, winner = torch.where(better, value, best), torch.where(better, index + first, winner)
    return winner
