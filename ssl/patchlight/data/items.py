"""What an item of a user's own data set may be, and how it becomes pixels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import sentence
from .reading import WrongItem
from .stored import check_size, decode, pixels_of, read_file

Stored = np.ndarray | Image.Image | bytes | Path  # an array is [H, W], or [H, W, C] of 1, 3 or 4 channels, uint8

KINDS = (
    "a Pillow image, an array [H, W, 3] or a tensor [3, H, W] of uint8, the bytes of a file or its path; alone, first in"
    ' a tuple, or as "image" in a dict'
)
_CHANNELS = (1, 3, 4)  # gray, RGB, RGB with alpha


def image_in(item: Any, name: str) -> Stored:
    """The image of an item; an error if it has none. name: the item's in messages."""
    image = item[0] if isinstance(item, tuple | list) and item else item
    image = image["image"] if isinstance(image, Mapping) and "image" in image else image
    if isinstance(image, Mapping) and {"bytes", "path"} <= image.keys():  # a file that `datasets` does not decode
        image = image["path"] if image["bytes"] is None else image["bytes"]
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and _has_channels(image.shape[:-2], image.ndim):
        return (image if image.ndim == 2 else image.permute(1, 2, 0)).cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and _has_channels(image.shape[2:], image.ndim):
        return image
    raise WrongItem(sentence(f"{name} must be {KINDS}", _described(image), _remedy(image)))


def _has_channels(channels: Sequence[int], dimensions: int) -> bool:
    return dimensions == 2 or (dimensions == 3 and channels[0] in _CHANNELS)


def read_image(image: Stored, most_pixels: int) -> np.ndarray:
    """The image, [H, W, 3] uint8 RGB; alpha is left out, as of files."""
    if isinstance(image, Path):
        image = read_file(image, most_pixels)
    if isinstance(image, bytes):
        return decode(image, most_pixels)
    if isinstance(image, Image.Image):
        check_size(image.width, image.height, most_pixels)
        return pixels_of(image)
    check_size(image.shape[1], image.shape[0], most_pixels)
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return np.require(image[:, :, :3], requirements=["C", "W"])  # torch takes no array that cannot be written


def _described(image: Any) -> str:
    if isinstance(image, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(image, Tensor) else "an array"
        return f"{kind} {list(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
    if isinstance(image, Mapping):
        return f"a dict with {', '.join(map(str, image)) or 'nothing'}"
    return "nothing" if image is None else f"{type(image).__name__}"


def _remedy(image: Any) -> str:
    if isinstance(image, Tensor | np.ndarray):
        if image.dtype not in (torch.uint8, np.uint8):
            return (
                "give values from 0 to 255 as uint8, and leave out ToTensor and Normalize: loaders crop and normalize"
            )
        if image.ndim == 4:
            return "give one image per item, without a DataLoader in between"
        return "give the channels first in a tensor, last in an array"
    if isinstance(image, Mapping):
        return 'name the image "image"'
    return "raise an error for an image that cannot be read" if image is None else "return one of these"
