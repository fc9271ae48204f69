"""What this machine can do at most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .timing import time_interleaved


@dataclass(frozen=True)
class Ceiling:
    """Measured in the same run."""

    bandwidth: float  # bytes per second of a large copy, read plus write
    flops: float  # per second of a large matrix product


@cache
def ceiling(device: str, dtype: torch.dtype) -> Ceiling:
    """What the floor of a case is computed from."""
    megabytes = 2048 if device == "cuda" else 256
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = time_interleaved({"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]}, device, seconds=0.5)
    return Ceiling(2 * source.numel() / (times["copy"].p20 / 1e3), 2 * side**3 / (times["product"].p20 / 1e3))
