"""From drawn tables to changed pixels: each number is in its column, and a batch gives the same as its images alone."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from patchlight.data.photometric import apply_photometric, photometric_table
from patchlight.data.policy import CropPolicy, CropSpec, CropTable, Photometric, dino_policy, sample_crops
from patchlight_kernels import JITTER_ORDERS


def drawn(images: int, photometric: Photometric, size: int = 20) -> tuple[CropPolicy, CropTable]:
    policy = CropPolicy((CropSpec(2, size, (0.5, 1.0), photometric=photometric),))
    table = sample_crops(policy, 0, 0, np.arange(images), np.tile((50, 40), (images, 1)))["global_crops"]
    return policy, table


def with_torchvision(pixels: torch.Tensor, table: CropTable, v: int, b: int, policy: CropPolicy) -> torch.Tensor:
    """The same numbers applied by torchvision's operations to a float image, in the order of DINO's augmentation."""
    numbers = {name: getattr(table, name)[v, b].item() for name in ("brightness", "contrast", "saturation", "hue")}
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    x = pixels[v, b].permute(2, 0, 1).float() / 255
    for kind in JITTER_ORDERS[table.order[v, b]]:
        x = operations[kind](x, list(numbers.values())[kind])
    if table.gray[v, b]:
        x = tv.rgb_to_grayscale(x, 3)
    if sigma := table.sigma[v, b].item():
        x = tv.gaussian_blur(x, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])
    if table.solarize[v, b]:
        x = tv.solarize(x, 0.5)
    return tv.normalize(x, policy.mean, policy.std)


def test_a_drawn_table_does_what_torchvision_does_with_its_numbers():
    policy, table = drawn(20, Photometric(solarize=0.3))
    pixels = torch.randint(0, 256, (2, 20, 20, 20, 3), dtype=torch.uint8)
    ours = apply_photometric(pixels, photometric_table(table), policy)
    assert ours.shape == (2, 20, 3, 20, 20)
    for coin in (table.brightness != 1, table.gray, table.sigma > 0, table.solarize):
        assert 0 < coin.sum() < coin.size, "each operation happens, and does not"
    for v in range(2):
        for b in range(20):
            theirs = with_torchvision(pixels, table, v, b, policy)
            assert (ours[v, b] - theirs).abs().max() <= 2e-5, "thousandths of a 255th"


def test_numbers_outside_of_torchvisions_ranges_are_refused():
    for wrong in ({"hue": 0.6}, {"brightness": 1.1}, {"blur_sigma": (0.0, 1.0)}, {"blur_sigma": (1.0, 5.0)}):
        with pytest.raises(ValueError, match=rf"Photometric\.{next(iter(wrong))}\S* must be a number in"):
            Photometric(**wrong)


def test_solarizing_inverts_from_128():
    policy, table = drawn(1, Photometric(jitter=0, gray=0, blur=0, solarize=1), size=16)
    x = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(2, 1, 16, 16, 3)
    mean, std = (torch.tensor(c)[:, None, None] for c in (policy.mean, policy.std))
    got = (apply_photometric(x, photometric_table(table), policy)[0, 0] * std + mean) * 255
    assert torch.equal(got.round().to(torch.uint8), tv.solarize(x[0, 0].permute(2, 0, 1), 128))


def test_an_image_does_not_depend_on_its_neighbors():
    policy, drawn_table = drawn(23, dino_policy().global_crops[1].photometric)
    pixels, table = torch.randint(0, 256, (2, 23, 20, 20, 3), dtype=torch.uint8), photometric_table(drawn_table)
    together = apply_photometric(pixels, table, policy)
    alone = [apply_photometric(pixels[:, b : b + 1], table[:, b : b + 1], policy) for b in range(23)]
    assert torch.equal(torch.cat(alone, dim=1), together)
