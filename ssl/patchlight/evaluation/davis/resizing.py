"""Sizes of frames and label maps as the released code has them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .scores import VOID

_LONG_SIDE_MULTIPLE = 64  # the longer side is cut down to a multiple of this


def frame_size(height: int, width: int, short_side: int, patch_size: int) -> tuple[int, int]:
    """Height and width that a frame is resized to. A square is treated like a wide frame."""
    short, long = short_side // patch_size * patch_size, int(short_side * max(height, width) / min(height, width))
    divides = _LONG_SIDE_MULTIPLE % patch_size == 0 and long >= _LONG_SIDE_MULTIPLE
    unit = _LONG_SIDE_MULTIPLE if divides else patch_size
    long = long // unit * unit
    return (long, short) if height > width else (short, long)


def resize_frame(image: np.ndarray, short_side: int, patch_size: int, mean: tuple, std: tuple) -> Tensor:
    """An image [H, W, 3] uint8 as pixels [3, H', W'], bilinear without antialiasing in 8 bits, as OpenCV does."""
    size = frame_size(image.shape[0], image.shape[1], short_side, patch_size)
    values = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)[0].round()
    shift, scale = (torch.tensor(channels)[:, None, None] * 255 for channels in (mean, std))
    return (values - shift) / scale


def first_labels(labels: np.ndarray, rows: int, columns: int) -> Tensor:
    """A label map as one-hot labels of patches [rows, columns, C], C the largest number plus 1; void is background."""
    labels = np.where(labels == VOID, 0, labels).astype(np.uint8)
    small = resize_labels(labels, (rows, columns))
    return F.one_hot(torch.from_numpy(small).long(), int(labels.max()) + 1).float()


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map [H, W] uint8 at another size, nearest."""
    return np.array(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
