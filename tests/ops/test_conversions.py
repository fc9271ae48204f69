"""Conversions between fp32 and 16 bits, which adamw shows unchanged: its copies are its parameters, its first mean a gradient."""

from __future__ import annotations

import pytest
import torch
from parity import every_runner, running
from torch import Tensor

from patchlight_kernels import adamw

HALF_DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def every_value(dtype: torch.dtype) -> Tensor:
    """All numbers, infinities and NaN of 16 bits."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def every_boundary(dtype: torch.dtype) -> Tensor:
    """In fp32: what 16 bits can hold, the middle between two of them, and the next fp32 values on both sides of these."""
    held = every_value(dtype).float()
    held = held[held.isfinite()].sort().values
    middle = ((held[1:].double() + held[:-1].double()) / 2).float()
    top = torch.tensor([65519.996, 65520.0, 65536.0, 6e5, 3.3895e38, 3.39618e38, 3.4e38, 1e-30, 1e-45, torch.inf])
    values = torch.cat([held, middle, top, -top])
    infinity = torch.full_like(values, torch.inf)
    around = [values, values.nextafter(infinity), values.nextafter(-infinity), torch.tensor([torch.nan])]
    return torch.cat(around)


def without_subnormals(values: Tensor, dtype: torch.dtype, device: str, name: str) -> Tensor:
    """Triton's interpreter takes those of bf16 for 0."""
    if (device, name, dtype) != ("cpu", "triton", torch.bfloat16):
        return values
    return values[~(values.abs() < torch.finfo(dtype).tiny)]


def step(parameter: Tensor, gradient: Tensor | None, copy: Tensor) -> Tensor:
    """The first mean of a step with beta 0, after it."""
    device, mean = parameter.device, torch.zeros_like(parameter)
    zero = torch.zeros((), device=device)
    adamw(
        [parameter],
        [gradient],
        [mean],
        [torch.zeros_like(parameter)],
        torch.zeros(1, device=device),
        torch.ones(1, device=device),
        lr=zero,
        weight_decay=zero,
        momentum=zero,
        freeze=zero,
        refused=zero,
        decayed=[False],
        copies=[copy],
        betas=(0.0, 0.9),
    )
    return mean


@every_runner
@HALF_DTYPES
def test_16_bits_are_the_nearest_to_fp32(dtype, device, name):
    values = without_subnormals(every_boundary(dtype).to(device), dtype, device, name)
    copy = torch.zeros_like(values, dtype=dtype)
    with running(device, name):
        step(values, None, copy)
    torch.testing.assert_close(copy, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@every_runner
@HALF_DTYPES
def test_fp32_is_what_16_bits_say(dtype, device, name):
    values = without_subnormals(every_value(dtype).to(device), dtype, device, name)
    with running(device, name):
        mean = step(torch.zeros(len(values), device=device), values, torch.zeros_like(values))
    wide = values.float()
    assert torch.equal(mean[wide.isfinite()], wide[wide.isfinite()])
    assert not mean[~wide.isfinite()].isfinite().any()
