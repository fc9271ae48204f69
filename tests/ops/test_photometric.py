"""photometric against torchvision's float operations, and against loops; values out of range; layouts."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from parity import SEED, every_runner, running
from torch import Tensor

from patchlight_kernels import JITTER_ORDERS, PHOTOMETRIC_COLUMNS, photometric, registry

SPEC = registry.spec("photometric")
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # results in 0..255
OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def images(count: int, height: int = 12, width: int = 15) -> Tensor:
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)


def table(count: int, **columns) -> Tensor:
    """Rows that change nothing but what is given."""
    rows = torch.tensor(list(PHOTOMETRIC_COLUMNS.values())).repeat(count, 1)
    for name, values in columns.items():
        rows[:, list(PHOTOMETRIC_COLUMNS).index(name)] = torch.as_tensor(values, dtype=torch.float32)
    return rows


def with_torchvision(pixels: Tensor, row: Tensor) -> Tensor:
    """One image [H, W, 3] in 0..255 through torchvision's operations on tensors between 0 and 1, float64 but for the hue."""
    numbers = dict(zip(PHOTOMETRIC_COLUMNS, row.tolist(), strict=True))
    x = pixels.permute(2, 0, 1).double() / 255
    for kind in JITTER_ORDERS[int(numbers["order"])]:
        x = OPERATIONS[kind](x, numbers[("brightness", "contrast", "saturation", "hue")[kind]])
    if numbers["gray"]:
        x = tv.rgb_to_grayscale(x, 3)
    reach = min(math.ceil(3 * numbers["sigma"]), min(x.shape[1:]) - 1)
    if reach:
        x = tv.gaussian_blur(x, [2 * reach + 1] * 2, [numbers["sigma"]] * 2)
    return 255 * (tv.solarize(x, numbers["solarize"] / 255) if numbers["solarize"] <= 255 else x)


def worst_against_torchvision(pixels: Tensor, rows: Tensor) -> float:
    out = photometric(pixels, rows, **PLAIN)
    assert out.isfinite().all()
    return max((o - with_torchvision(p, r)).abs().max().item() for o, p, r in zip(out, pixels, rows, strict=True))


def test_a_neutral_row_only_normalizes():
    x = images(3)
    assert torch.equal(photometric(x, table(3), **PLAIN).round(), x.movedim(-1, 1).float())
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = tv.normalize(x.movedim(-1, 1).double() / 255, mean, std)
    assert (photometric(x, table(3), mean, std) - expected).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("brightness", (0.0, 0.6, 1.4, 16.0)),
        ("contrast", (0.0, 0.6, 1.4, 16.0)),
        ("saturation", (0.0, 0.8, 1.2, 16.0)),
        ("hue", (-0.5, -0.1, 0.03, 0.5)),
        ("sigma", (0.1, 0.4, 1.0, 2.0, 3.6)),
        ("solarize", (0.0, 99.5, 127.5, 255.0)),  # bytes on a threshold: below
        ("gray", (1.0,)),
    ],
)
def test_each_operation_equals_torchvisions(name, values):
    count = len(values)
    assert worst_against_torchvision(images(count), table(count, **{name: values})) < 1e-3, "in 255ths"


def test_every_order_equals_torchvisions():
    x = images(1).repeat(24, 1, 1, 1)
    rows = table(24, brightness=1.4, contrast=0.6, saturation=1.2, hue=0.1, order=range(24))
    assert worst_against_torchvision(x, rows) < 1e-3
    changed = photometric(x, rows, **PLAIN)
    assert (changed[7] - changed[11]).abs().max() > 5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (96, 96), (224, 224)])
def test_random_rows_equal_torchvisions(height, width):
    count = 48 if height < 96 else 4
    case = registry.Case("", {"samples": count, "height": height, "width": width, "blur": 0.5})
    arguments = SPEC.inputs(case, torch.float32, "cpu", SEED)
    assert worst_against_torchvision(arguments["pixels"], arguments["table"]) < 2e-3


@pytest.mark.parametrize("byte", [0, 255])
def test_black_and_white_stay_finite(byte):
    x = torch.full((24, 6, 6, 3), byte, dtype=torch.uint8)
    rows = table(
        24, brightness=1.4, contrast=0.6, saturation=1.2, hue=0.1, order=range(24), sigma=1.0, gray=[0, 1] * 12
    )
    assert worst_against_torchvision(x, rows) < 1e-3


def test_a_turn_of_hue_leaves_gray_alone_and_a_whole_turn_everything():
    gray = images(4)[..., :1].expand(-1, -1, -1, 3)
    assert torch.equal(photometric(gray, table(4, hue=[-0.5, -0.1, 0.1, 0.5]), **PLAIN), gray.movedim(-1, 1).float())
    x = images(2)
    there = photometric(x, table(2, hue=[0.5, -0.5]), **PLAIN)
    assert (there[0] - photometric(x[:1], table(1, hue=-0.5), **PLAIN)[0]).abs().max() < 1e-3, "half a turn either way"
    assert (there.amax(1) - x.amax(-1)).abs().max() < 1e-3, "value and chroma stay"
    assert (there.amin(1) - x.amin(-1)).abs().max() < 1e-3


def test_solarizing_bytes_is_exact():
    x = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    out = photometric(x, table(2, solarize=[128.0, 127.5]), **PLAIN).round().to(torch.uint8)
    assert torch.equal(out[0], tv.solarize(x[0].movedim(-1, 0), 128))
    assert torch.equal(out[1], out[0]), "nothing lies between the two"


@every_runner
def test_a_wide_blur_reaches_twelve_pixels(device, name):
    """Against loops in float64; the mirror does not repeat the edge."""
    x, sigma = images(2, 30, 14), (9.0, math.inf)
    with running(device, name):
        out = photometric(x.to(device), table(2, sigma=sigma).to(device), **PLAIN).cpu()
    mirrored = lambda i, size: size - 1 - abs(size - 1 - abs(i))
    for image, s, got in zip(x.double(), sigma, out, strict=True):
        weights = [math.exp(-0.5 * (d / s) ** 2) for d in range(-12, 13)]
        total = sum(weights)
        rows = torch.stack([sum(w * image[mirrored(y + d, 30)] for d, w in enumerate(weights, -12)) for y in range(30)])
        both = [sum(w * rows[:, mirrored(x + d, 14)] for d, w in enumerate(weights, -12)) for x in range(14)]
        assert (got - torch.stack(both, 1).movedim(-1, 0) / total**2).abs().max() < 1e-3


@every_runner
def test_what_is_out_of_range_changes_nothing(device, name):
    x = images(10, 5, 6)
    nan = math.nan
    wrong = table(
        10,
        brightness=[nan, -1.0, 2000.0, 1, 1, 1, 1, 1, 1, 1],
        contrast=[1, 1, 1, nan, -0.1, math.inf, 1, 1, 1, 1],
        saturation=[1, 1, 1, 1, 1, 1, nan, -3.0, 1, 1],
        hue=[0, 0, 0, 0, 0, 0, 0, 0, nan, 0.6],
        gray=[nan, -1.0] * 5,
        sigma=[nan, -1.0] * 5,
        solarize=[nan, math.inf] * 5,
    )
    with running(device, name):
        assert torch.equal(
            photometric(x.to(device), wrong.to(device), **PLAIN), photometric(x, table(10), **PLAIN).to(device)
        )
        amounts = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": 0.1}
        outside = photometric(
            x[:5].to(device), table(5, **amounts, order=[nan, -1.0, 24.0, 1e9, 0.0]).to(device), **PLAIN
        )
        first = photometric(x[:5].to(device), table(5, **amounts).to(device), **PLAIN)
    assert torch.equal(outside, first)


@every_runner
def test_a_sample_does_not_depend_on_its_neighbors(device, name):
    arguments = SPEC.inputs(SPEC.tests[1], torch.float32, device, SEED)
    pixels, rows = arguments["pixels"], arguments["table"]
    with running(device, name):
        together = photometric(**arguments)
        for m in (0, 3, 6):
            alone = photometric(**{**arguments, "pixels": pixels[m : m + 1], "table": rows[m : m + 1]})
            assert torch.equal(alone[0], together[m])


@every_runner
@pytest.mark.parametrize("layout", ["channels first", "every second", "offset by one byte"])
def test_takes_any_layout_of_pixels(layout, device, name):
    arguments = SPEC.inputs(SPEC.tests[1], torch.float32, device, SEED)
    pixels = arguments["pixels"]
    changed = {
        "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
        "every second": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
        "offset by one byte": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }[layout](pixels)
    with running(device, name):
        assert torch.equal(photometric(**{**arguments, "pixels": changed}), photometric(**arguments))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, r"uint8 \[samples, height, width, 3\]"),
        ({"pixels": torch.zeros(2, 8, 8, 3)}, "got torch.float32"),
        ({"table": torch.zeros(2, 7)}, r"table must be float32 \[2, 8\]"),
        ({"table": torch.zeros(3, 8)}, r"got torch.float32 \(3, 8\)"),
        ({"table": torch.zeros(2, 8, dtype=torch.float16)}, "got torch.float16"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"mean": (0.5,)}, "mean must be three finite numbers"),
        ({"dtype": torch.uint8}, "dtype must be float32"),
        ({"table": torch.zeros(2, 8, device="meta")}, "table must be on cpu like pixels, got meta"),
    ],
)
def test_errors_say_rule_got_and_remedy(change, sentence):
    good = {"pixels": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "table": table(2), **PLAIN}
    with pytest.raises((ValueError, TypeError), match=sentence):
        photometric(**(good | change))
