"""What an item of a data set may be: all kinds give the pixels that a file gives; anything else is named."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from data.pictures import picture
from PIL import Image

from patchlight.data.items import image_in, read_image
from patchlight.data.reading import WrongItem
from patchlight.data.stored import MOST_PIXELS, decode

PIXELS = picture(3)
GRAY = PIXELS[:, :, 1]
ALPHA = np.dstack([PIXELS, GRAY])


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read(item, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    return read_image(image_in(item, "item 17 of Toy"), most_pixels)


def locked(pixels: np.ndarray) -> np.ndarray:
    """As of a file that is mapped for reading."""
    pixels = pixels.copy()
    pixels.flags.writeable = False
    return pixels


@pytest.mark.parametrize(
    ("item", "file"),
    [
        (Image.fromarray(PIXELS), PIXELS),
        (PIXELS, PIXELS),
        (locked(PIXELS), PIXELS),
        (PIXELS[::2, ::3], PIXELS[::2, ::3]),
        (tensor(PIXELS), PIXELS),
        (png(PIXELS), PIXELS),
        (bytearray(png(PIXELS)), PIXELS),
        ((PIXELS, 4), PIXELS),
        ([tensor(PIXELS)], PIXELS),
        ({"image": Image.fromarray(PIXELS), "label": 2}, PIXELS),
        ({"image": {"bytes": png(PIXELS), "path": None}}, PIXELS),
        (GRAY, GRAY),
        (GRAY[:, :, None], GRAY),
        (torch.from_numpy(GRAY.copy()), GRAY),
        (torch.from_numpy(GRAY.copy())[None], GRAY),
        (Image.fromarray(GRAY), GRAY),
        (ALPHA, ALPHA),
        (tensor(ALPHA), ALPHA),
        (Image.fromarray(ALPHA), ALPHA),
        (Image.fromarray(PIXELS).convert("CMYK").convert("RGB"), PIXELS),
        (Image.fromarray((GRAY.astype(np.uint16) << 8) + 200), GRAY),
    ],
)  # fmt: skip
def test_every_kind_gives_the_pixels_of_a_file(item, file):
    pixels = read(item)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, decode(png(np.ascontiguousarray(file))))
    torch.from_numpy(pixels)  # without a warning


def test_paths(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(png(PIXELS))
    for item in (path, str(path), (str(path), 3), {"image": {"bytes": None, "path": str(path)}}):
        assert np.array_equal(read(item), PIXELS)
    with pytest.raises(FileNotFoundError):
        read(Path("none.png"))


@pytest.mark.parametrize(
    ("item", "got"),
    [
        (
            PIXELS / 255,
            r"got an array \[\d+, \d+, 3\] of float64; give values from 0 to 255 as uint8, and leave out ToT",
        ),
        (tensor(PIXELS).float(), r"got a tensor \[3, \d+, \d+\] of float32; give values"),
        (PIXELS.astype(np.int64), r"got an array .* of int64; give values"),
        (
            PIXELS.transpose(2, 0, 1),
            r"got an array \[3, \d+, \d+\] of uint8; give the channels first in a tensor, last",
        ),
        (torch.from_numpy(PIXELS), r"got a tensor \[\d+, \d+, 3\] of uint8; give the channels first"),
        (torch.zeros(5, 3, 8, 8, dtype=torch.uint8), r"got a tensor \[5, 3, 8, 8\] of uint8; give one image per item"),
        ({"img": Image.fromarray(PIXELS)}, r'got a dict with img; name the image "image"'),
        ({}, r"got a dict with nothing; name"),
        (None, r"got nothing; raise an error for an image that cannot be read"),
        ((), r"got tuple; return one"),
        (17, r"got int; return one of these"),
        ((4, PIXELS), r"got int; return one of these"),
    ],
)
def test_anything_else_is_named(item, got):
    with pytest.raises(WrongItem, match=f"item 17 of Toy must be a Pillow image, an array .*, {got}"):
        read(item)


@pytest.mark.parametrize("item", [Image.fromarray(PIXELS), PIXELS, tensor(PIXELS), png(PIXELS)])
def test_an_image_of_too_many_pixels_cannot_be_read(item):
    height, width = PIXELS.shape[:2]
    assert read(item, height * width).shape == PIXELS.shape
    with pytest.raises(ValueError, match=f"has {width} x {height} pixels; 1 to {height * width - 1} are read") as error:
        read(item, height * width - 1)
    assert not isinstance(error.value, WrongItem), "another image takes its place"


def test_an_image_without_pixels_cannot_be_read():
    with pytest.raises(ValueError, match="has 0 x 5 pixels"):
        read(np.zeros((5, 0, 3), np.uint8))
