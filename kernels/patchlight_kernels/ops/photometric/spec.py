"""Cases, inputs and costs of photometric."""

from __future__ import annotations

from typing import Any

import torch

from ...registry import Case, OpSpec, first_images, generator
from .op import OP, photometric
from .table import JITTER_ORDERS, PHOTOMETRIC_COLUMNS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _case(samples: int, height: int, width: int, *, blur: float = 0.5, **more: Any) -> Case:
    """`blur`: part of the samples that are blurred."""
    name = f"M{samples}-{height}x{width}-blur{round(100 * blur)}"
    return Case(name, {"samples": samples, "height": height, "width": width, "blur": blur}, **more)


TESTS = (
    _case(3, 1, 1),
    _case(7, 7, 5),  # primes; rows that are not 4-byte aligned; smaller than the blur's kernel
    _case(2, 53, 70, blur=1),  # more than one tile each way
    _case(24, 6, 12),  # every order
    _case(2, 1, 9, blur=1),
    _case(0, 8, 8),  # no samples
    _case(2, 0, 3),  # no pixels
)

BENCHES = (
    _case(32, 96, 96, small=True),
    _case(8, 224, 224, blur=1, small=True),
    _case(8, 224, 224, blur=0.1, small=True),
    _case(1024, 96, 96),
    _case(128, 224, 224, blur=1),
    _case(128, 224, 224, blur=0.1),
    _case(2048, 96, 96),
    _case(512, 224, 224),
)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """DINO's distributions over all orders; bytes with flat areas, black, white and gray in them."""
    s = case.sizes
    samples = s["samples"]
    draws = generator(seed, s["height"], s["width"])
    pixels = torch.randint(0, 256, (samples, s["height"], s["width"], 3), generator=draws, dtype=torch.uint8)
    pixels[:, : s["height"] // 4] = pixels[:, : s["height"] // 4, :, :1] // 128 * 255
    u = dict(zip(PHOTOMETRIC_COLUMNS, torch.rand(len(PHOTOMETRIC_COLUMNS), samples, generator=draws), strict=True))
    chosen = torch.rand(4, samples, generator=draws)
    jittered = chosen[0] < 0.8
    columns = {
        "brightness": torch.where(jittered, 0.6 + 0.8 * u["brightness"], 1.0),
        "contrast": torch.where(jittered, 0.6 + 0.8 * u["contrast"], 1.0),
        "saturation": torch.where(jittered, 0.8 + 0.4 * u["saturation"], 1.0),
        "hue": torch.where(jittered, 0.2 * u["hue"] - 0.1, 0.0),
        "order": torch.arange(samples) % len(JITTER_ORDERS),
        "gray": chosen[1] < 0.2,
        "sigma": torch.where(chosen[2] < s["blur"], 0.1 + 1.9 * u["sigma"], 0.0),
        "solarize": torch.where(chosen[3] < 0.2, 127.5, 256.0),  # continuous there: rounding moves no pixel
    }
    table = torch.stack([columns[name].float() for name in PHOTOMETRIC_COLUMNS], dim=1)
    return {"pixels": pixels.to(device), "table": table.to(device), "mean": MEAN, "std": STD, "dtype": dtype}


def _min_bytes(case: Case, dtype: torch.dtype) -> int:
    """Every byte read once, every value written once."""
    s = case.sizes
    return s["samples"] * s["height"] * s["width"] * 3 * (1 + dtype.itemsize)


def _flops(case: Case) -> int:
    """Per pixel: four jitters, normalizing, and for blurred samples 2 x 9 products of three channels (sigma 1.05 on average)."""
    s = case.sizes
    return int(s["samples"] * s["height"] * s["width"] * (100 + s["blur"] * 2 * 2 * 9 * 3))


SPEC = OpSpec(
    op=OP,
    public=photometric,
    tests=TESTS,
    benches=BENCHES,
    inputs=_inputs,
    min_bytes=_min_bytes,
    flops=_flops,
    sample=first_images(16, "pixels", "table"),
)
