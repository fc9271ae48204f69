"""photometric: uint8 crops and a table of numbers to normalized crops: jitter, gray, blur, solarize, normalize in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import extension, hardware
from ...dispatch import Impl, Op, first_reason
from . import reference
from .table import PHOTOMETRIC_COLUMNS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _bind(
    pixels: Tensor, table: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> tuple:
    """Checks the public arguments and returns the raw ones."""
    if pixels.dim() != 4 or pixels.shape[3] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(
            f"photometric: pixels must be uint8 [samples, height, width, 3], got {pixels.dtype} {tuple(pixels.shape)};"
            " put the channels last and do not normalize before"
        )
    if dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"photometric: dtype must be float32, bfloat16, float16 or float64, got {dtype}; choose one")
    columns = len(PHOTOMETRIC_COLUMNS)
    if table.shape != (pixels.shape[0], columns) or table.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"photometric: table must be float32 [{pixels.shape[0]}, {columns}], a row of PHOTOMETRIC_COLUMNS for each"
            f" sample, got {table.dtype} {tuple(table.shape)}; stack the columns in that order"
        )
    if table.device != pixels.device:
        raise ValueError(
            f"photometric: pixels and table must share a device, got {pixels.device} and {table.device}; move the table"
        )
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(
            f"photometric: mean and std must be three numbers each, std positive, got {mean} and {std}; give those of red,"
            " green and blue in 0..1"
        )
    return pixels.contiguous(), table.detach().contiguous(), [float(m) for m in mean], [float(s) for s in std], dtype


def _unfit(pixels: Tensor, table: Tensor, dtype: torch.dtype) -> str | None:
    """What no fast implementation takes."""
    return first_reason(
        "float64 runs the reference only" if torch.float64 in (dtype, table.dtype) else None,
        "there is nothing to compute" if pixels.numel() == 0 else None,
    )


def _cuda_unsupported(pixels: Tensor, table: Tensor, mean, std, dtype: torch.dtype) -> str | None:
    return first_reason(
        _unfit(pixels, table, dtype),
        "a picture of 2^29 pixels or more overflows its offsets" if pixels[:1].numel() >= 3 << 29 else None,
        hardware.no_cuda_library(pixels, "photometric_fwd"),
    )


def _cpp_unsupported(pixels: Tensor, table: Tensor, mean, std, dtype: torch.dtype) -> str | None:
    return first_reason(_unfit(pixels, table, dtype), hardware.no_cpu_library(pixels, "photometric_fwd"))


def _triton_unsupported(pixels: Tensor, table: Tensor, mean, std, dtype: torch.dtype) -> str | None:
    return first_reason(
        _unfit(pixels, table, dtype),
        "a picture of 2^29 pixels or more overflows its offsets" if pixels[:1].numel() >= 3 << 29 else None,
        hardware.no_triton(pixels),
    )


def _native_fwd(*raw) -> Tensor:
    return extension.native("photometric_fwd")(*raw)


def _triton_fwd(*raw) -> Tensor:
    from .triton_kernels import photometric_fwd  # here, so that a machine without Triton can import the package

    return photometric_fwd(*raw)


OP = Op(
    "photometric",
    bind=_bind,
    impls=(
        Impl("cuda", _native_fwd, _cuda_unsupported),
        Impl("cpp", _native_fwd, _cpp_unsupported),  # before Triton, which has CPU tensors only in its interpreter
        Impl("triton", _triton_fwd, _triton_unsupported),
        Impl("reference", reference.photometric_fwd, lambda *raw: None),
    ),
)


def _run(*raw) -> Tensor:
    return OP.choose(*raw).fwd(*raw)


def _fake(pixels: Tensor, table: Tensor, mean: list[float], std: list[float], dtype: torch.dtype) -> Tensor:
    return pixels.new_empty(pixels.shape[0], 3, *pixels.shape[1:3], dtype=dtype)


_fwd = OP.define(
    "fwd",
    "(Tensor pixels, Tensor table, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    run=_run,
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
        table: [M, 8] fp32, the columns of PHOTOMETRIC_COLUMNS with what leaves a sample as it is. A factor outside
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
