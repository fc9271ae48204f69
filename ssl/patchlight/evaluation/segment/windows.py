"""Predictions for whole scenes from overlapping windows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from ..encoder import autocast
from .heads import resized
from .model import Segmenter
from .protocols import SegmentProtocol

_MOST_SCORES = 1 << 27  # floats of one image's class scores that are enlarged at a time


@torch.no_grad()
def predict(
    model: Segmenter, image: np.ndarray, protocol: SegmentProtocol, device: torch.device, precision: str
) -> np.ndarray:
    """The class of every pixel [H, W] int64: scores of overlapping windows are averaged at the test size, then enlarged."""
    pixels = v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), [protocol.test_short_side])
    pixels = model.encoder.normalize(pixels.to(device)[None])
    height, width = pixels.shape[-2:]
    patch = model.encoder.patch_size
    total: Tensor | None = None
    count = torch.zeros(height, width, device=device)
    for y in window_starts(height, protocol.crop, protocol.stride):
        for x in window_starts(width, protocol.crop, protocol.stride):
            window = pixels[..., y : y + protocol.crop, x : x + protocol.crop]
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
