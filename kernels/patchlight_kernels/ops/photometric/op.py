"""photometric: from uint8 crops and a table to normalized crops: jitter, gray, blur, solarize, normalize in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import hardware
from ...arguments import check_dtype, check_required, kind_of, message
from ...dispatch import Impl, Op, first_reason, triton_call
from ...extension import native_call
from . import reference
from .table import PHOTOMETRIC_COLUMNS

OP_NAME = "photometric"


def _bind(
    pixels: Tensor, table: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    check_required(OP_NAME, pixels=pixels, table=table)
    if pixels.dim() != 4 or pixels.shape[3] != 3 or pixels.dtype != torch.uint8:
        rule, got = "pixels must be uint8 [samples, height, width, 3]", f"{pixels.dtype} {tuple(pixels.shape)}"
        raise ValueError(message(OP_NAME, rule, got, "put the channels last and do not normalize before"))
    check_dtype(OP_NAME, "dtype", dtype)
    samples, columns = pixels.shape[0], len(PHOTOMETRIC_COLUMNS)
    if table.shape != (samples, columns) or table.dtype not in (torch.float32, torch.float64):
        rule = f"table must be float32 [{samples}, {columns}], a row of PHOTOMETRIC_COLUMNS for each sample"
        raise ValueError(
            message(OP_NAME, rule, f"{table.dtype} {tuple(table.shape)}", "stack the columns in that order")
        )
    if table.device != pixels.device:
        rule = f"table must be on {pixels.device} like pixels"
        raise ValueError(message(OP_NAME, rule, table.device, "move the table"))
    mean, std = (_three_numbers(name, values) for name, values in (("mean", mean), ("std", std)))
    if min(std) <= 0:
        raise ValueError(message(OP_NAME, "std must be positive", std, "give those of red, green and blue in 0..1"))
    return pixels.contiguous(), table.detach().contiguous(), mean, std, dtype


def _three_numbers(name: str, values: Sequence[float]) -> list[float]:
    rule, remedy = f"{name} must be three finite numbers", "give those of red, green and blue in 0..1"
    if not isinstance(values, (list, tuple)):
        raise TypeError(message(OP_NAME, rule, kind_of(values), remedy))
    if len(values) != 3 or not all(isinstance(x, (int, float)) and abs(x) < math.inf for x in values):
        raise ValueError(message(OP_NAME, rule, values, remedy))
    return [float(x) for x in values]


def _unsupported_by_all(pixels: Tensor, table: Tensor, dtype: torch.dtype) -> str | None:
    return hardware.unsupported_by_all(torch.promote_types(dtype, table.dtype), pixels)


def _too_many_pixels(pixels: Tensor) -> str | None:
    too_many = pixels[:1].numel() >= 3 << 29
    return "a picture of 2^29 pixels or more overflows its 32-bit offsets" if too_many else None


def _cuda_unsupported(pixels: Tensor, table: Tensor, mean, std, dtype: torch.dtype) -> str | None:
    return first_reason(
        _unsupported_by_all(pixels, table, dtype),
        _too_many_pixels(pixels),
        hardware.no_cuda_library(pixels, "photometric_fwd"),
        hardware.grid_too_large(len(pixels) * -(-pixels.shape[1] // 48) * -(-pixels.shape[2] // 64)),  # tiles
    )


def _cpp_unsupported(pixels: Tensor, table: Tensor, mean, std, dtype: torch.dtype) -> str | None:
    return first_reason(_unsupported_by_all(pixels, table, dtype), hardware.no_cpu_library(pixels, "photometric_fwd"))


def _triton_unsupported(pixels: Tensor, table: Tensor, mean, std, dtype: torch.dtype) -> str | None:
    return first_reason(
        _unsupported_by_all(pixels, table, dtype),
        _too_many_pixels(pixels),
        hardware.no_triton(pixels),
        hardware.grid_too_large(3 * len(pixels) * -(-pixels.shape[1] * pixels.shape[2] // 1024)),
    )


OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        Impl("cuda", native_call("photometric_fwd"), _cuda_unsupported),
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", native_call("photometric_fwd"), _cpp_unsupported),
        Impl("triton", triton_call(__package__, "photometric_fwd"), _triton_unsupported),
        Impl("reference", reference.photometric_fwd, lambda *args: None),
    ),
)


def _fake(pixels: Tensor, table: Tensor, mean: list[float], std: list[float], dtype: torch.dtype) -> Tensor:
    return pixels.new_empty(pixels.shape[0], 3, *pixels.shape[1:3], dtype=dtype)


_fwd = OP.define(
    "fwd",
    "(Tensor pixels, Tensor table, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    run=OP.forward,
    fake=_fake,
)


def photometric(
    pixels: Tensor, table: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Changes colors and sharpness of every sample as its row of the table says, and normalizes: bytes in, floats out.

    In this order, as DINO's augmentation: brightness, contrast, saturation and hue in the row's own order, gray, Gaussian
    blur, solarize, (x / 255 - mean) / std. Each is torchvision's operation on float tensors, without rounding in between.

    Args:
        pixels: [M, H, W, 3] uint8, channels last as decoders give them; other strides are copied.
        table: [M, 8] fp32, the columns of PHOTOMETRIC_COLUMNS, which also gives the values that change nothing. A factor outside
            0..1024, a hue outside -0.5..0.5, an order outside 0..23 and any NaN change nothing (order: 0).
        mean, std: three numbers each, of values in 0..1.
        dtype: of the result: fp32, bf16 or fp16 (fp64 runs the reference in fp64).

    Returns:
        [M, 3, H, W].

    A sample's kernel reaches three sigmas (at most 12 pixels, and less than the shorter side); borders are mirrored.
    No gradient; fp32 inside; a sample does not depend on its neighbors. Traffic: 3 bytes per pixel read once, or twice where
    contrast needs the mean of the whole picture, and the result written.
    """
    return _fwd(*_bind(pixels, table, mean, std, dtype))
