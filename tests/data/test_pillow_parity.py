"""What the float chain differs by from Pillow's bytes, operation by operation: the numbers of docs/photometric.md."""

import re

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from data.pictures import picture
from parity import ROOT
from PIL import Image, ImageFilter, ImageOps

from patchlight_kernels import JITTER_ORDERS, PHOTOMETRIC_COLUMNS, photometric

COUNT = 24
RNG = np.random.default_rng(0)
FACTORS, WEAK, TURNS, SIGMAS = (RNG.uniform(*r, COUNT) for r in ((0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)))
IMAGES = [Image.fromarray(picture(i)).resize((96, 96), Image.Resampling.BICUBIC) for i in range(COUNT)]


def jittered(image: Image.Image, i: int) -> Image.Image:
    operations = (
        lambda x: tv.adjust_brightness(x, FACTORS[i]),
        lambda x: tv.adjust_contrast(x, FACTORS[-1 - i]),
        lambda x: tv.adjust_saturation(x, WEAK[i]),
        lambda x: tv.adjust_hue(x, TURNS[i]),
    )
    for kind in JITTER_ORDERS[i]:
        image = operations[kind](image)
    return image


def blurred(image: Image.Image, i: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(SIGMAS[i])))


JITTER = {
    "brightness": FACTORS, "contrast": FACTORS[::-1], "saturation": WEAK, "hue": TURNS, "order": range(COUNT)
}  # fmt: skip
OPERATIONS = {
    "brightness": (lambda x, i: tv.adjust_brightness(x, FACTORS[i]), {"brightness": FACTORS}),
    "contrast": (lambda x, i: tv.adjust_contrast(x, FACTORS[i]), {"contrast": FACTORS}),
    "saturation": (lambda x, i: tv.adjust_saturation(x, WEAK[i]), {"saturation": WEAK}),
    "hue": (lambda x, i: tv.adjust_hue(x, TURNS[i]), {"hue": TURNS}),
    "gray": (lambda x, i: tv.rgb_to_grayscale(x, 3), {"gray": 1}),
    "blur": (blurred, {"sigma": SIGMAS}),
    "solarize": (lambda x, i: ImageOps.solarize(x, 128), {"solarize": 127.5}),
    "jitter, blur": (lambda x, i: blurred(jittered(x, i), i), {**JITTER, "sigma": SIGMAS}),
}


def documented() -> dict[str, tuple[float, float]]:
    """Largest and mean difference per operation, from the table of the document."""
    text = (ROOT / "docs/photometric.md").read_text()
    rows = re.findall(r"^\| ([a-z, ]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    return {name: (float(largest), float(mean)) for name, largest, mean in rows}


def difference(operation, columns) -> torch.Tensor:
    table = torch.tensor(list(PHOTOMETRIC_COLUMNS.values())).repeat(COUNT, 1)
    for name, values in columns.items():
        table[:, list(PHOTOMETRIC_COLUMNS).index(name)] = torch.as_tensor(np.array(values, np.float32))
    pixels = torch.from_numpy(np.stack(IMAGES))
    ours = photometric(pixels, table, (0, 0, 0), (1 / 255, 1 / 255, 1 / 255))
    theirs = torch.from_numpy(np.stack([operation(image, i) for i, image in enumerate(IMAGES)]))
    return (ours - theirs.movedim(-1, 1)).abs()


@pytest.mark.parametrize("name", OPERATIONS)
def test_differs_from_pillow_as_documented(name):
    found = difference(*OPERATIONS[name])
    print(f"| {name} | {found.max():.2f} | {found.mean():.3f} |")
    largest, mean = documented()[name]
    assert largest / 2 <= found.max() + 1e-3 <= 1.02 * largest + 0.02
    assert mean / 2 <= found.mean() + 1e-3 <= 1.02 * mean + 0.02
