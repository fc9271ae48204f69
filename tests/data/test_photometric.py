"""Color operations against torchvision's, one at a time and in a chain."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from patchlight.data import photometric as ours
from patchlight.data.photometric import photometric
from patchlight.data.policy import JITTER_ORDERS, CropTable


def images(count: int = 6, size: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def table(count: int, **changed) -> CropTable:
    """One view of `count` images, unchanged but for what is given."""
    columns = {
        "box": np.zeros((1, count, 4), np.int64),
        "flip": np.zeros((1, count), bool),
        "brightness": np.ones((1, count), np.float32),
        "contrast": np.ones((1, count), np.float32),
        "saturation": np.ones((1, count), np.float32),
        "hue": np.zeros((1, count), np.float32),
        "order": np.zeros((1, count), np.int64),
        "gray": np.zeros((1, count), bool),
        "sigma": np.zeros((1, count), np.float32),
        "solarize": np.zeros((1, count), bool),
    }
    columns |= {name: np.array(value, columns[name].dtype)[None] for name, value in changed.items()}
    return CropTable(size=20, **columns)


def test_nothing_changes_without_a_reason():
    x = images()
    assert torch.equal(photometric(x[None], table(6))[0], x)


@pytest.mark.parametrize(
    ("name", "values", "reference"),
    [
        ("brightness", [0.6, 0.9, 1.1, 1.4], tv.adjust_brightness),
        ("contrast", [0.6, 0.9, 1.1, 1.4], tv.adjust_contrast),
        ("saturation", [0.8, 0.9, 1.1, 1.2], tv.adjust_saturation),
        ("hue", [-0.1, -0.03, 0.05, 0.1], tv.adjust_hue),
    ],
)
def test_each_operation_is_torchvisions(name, values, reference):
    x = images(4)
    expected = [reference(image.float() / 255, value) for image, value in zip(x, values, strict=True)]
    difference = photometric(x[None], table(4, **{name: values}))[0] / 255 - torch.stack(expected)
    assert difference.abs().max() <= 0.5 / 255 + 1e-5, "nothing but the rounding to uint8"


def test_gray_and_gray_pixels_under_a_turn_of_hue():
    x = images(2)
    gray = photometric(x[None], table(2, gray=[1, 1]))[0]
    assert (gray[:, 0] == gray[:, 1]).all()
    assert (gray[:, 0] == gray[:, 2]).all()
    assert (gray.float() - tv.rgb_to_grayscale(x.float(), 3)).abs().max() <= 0.51
    assert torch.equal(photometric(gray[None], table(2, hue=[0.1, -0.1]))[0], gray)


def test_blur_is_torchvisions_with_a_kernel_wide_enough():
    x, sigmas = images(3), [0.3, 1.0, 2.0]
    expected = torch.stack([tv.gaussian_blur(i.float(), [13, 13], [s, s]) for i, s in zip(x, sigmas, strict=True)])
    assert (photometric(x[None], table(3, sigma=sigmas))[0] - expected).abs().max() <= 0.5 + 1e-3
    tiny = images(1, 4)
    assert photometric(tiny[None], table(1, sigma=[2.0])).shape == (1, 1, 3, 4, 4), "smaller than the kernel"


def test_solarize_inverts_from_128():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(photometric(x[None], table(1, solarize=[1]))[0], tv.solarize(x, 128))


@pytest.mark.parametrize("order", [0, 7, 23])
def test_the_order_of_the_jitter_is_that_of_the_table(order):
    x = images(1)
    factors = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.2, "hue": 0.1}
    expected = x.float() / 255
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for kind in JITTER_ORDERS[order]:
        expected = operations[kind](expected, list(factors.values())[kind])
    got = photometric(x[None], table(1, order=[order], **{name: [value] for name, value in factors.items()}))
    assert (got[0] / 255 - expected).abs().max() <= 0.5 / 255 + 1e-4
    other = photometric(x[None], table(1, order=[11], **{name: [value] for name, value in factors.items()}))
    assert (got.int() - other.int()).abs().max() > 5, "the order moves pixels"


def test_an_image_does_not_depend_on_its_neighbors(monkeypatch):
    rng, x = np.random.default_rng(0), images(40)
    columns = {
        "brightness": rng.uniform(0.6, 1.4, 40), "contrast": rng.uniform(0.6, 1.4, 40), "hue": rng.uniform(-0.1, 0.1, 40),
        "saturation": rng.uniform(0.8, 1.2, 40), "order": rng.integers(0, 24, 40), "gray": rng.random(40) < 0.2,
        "sigma": rng.uniform(0.1, 2, 40) * (rng.random(40) < 0.5), "solarize": rng.random(40) < 0.2,
    }  # fmt: skip
    together = photometric(x[None], table(40, **columns))[0]
    monkeypatch.setattr(ours, "_CHUNK_PIXELS", 400 * 7)
    assert torch.equal(photometric(x[None], table(40, **columns))[0], together)
    alone = [
        photometric(x[None, i : i + 1], table(1, **{n: c[i : i + 1] for n, c in columns.items()}))[0] for i in range(40)
    ]
    assert torch.equal(torch.cat(alone), together)
