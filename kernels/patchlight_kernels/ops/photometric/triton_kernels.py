"""Triton kernels of photometric: a program per sample for everything before the blur, then the blur along rows and columns.

There are always the same three launches, as the host does not read the table; programs without work end at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_functions import store
from ...tuning import autotune
from .table import GRAY, JITTER_ORDERS, MAX_FACTOR, MAX_HUE, MAX_REACH, PHOTOMETRIC_COLUMNS


def _packed_orders(rows: slice) -> int:
    """Eight rows of JITTER_ORDERS in 64 bits, two for each place."""
    kinds = [kind for order in JITTER_ORDERS[rows] for kind in order]
    packed = sum(kind << (2 * place) for place, kind in enumerate(kinds))
    return packed - (1 << 64) if packed >> 63 else packed


_COLUMNS = tl.constexpr(len(PHOTOMETRIC_COLUMNS))
_FIRST, _SECOND, _THIRD = (tl.constexpr(_packed_orders(slice(row, row + 8))) for row in (0, 8, 16))
_MAX_FACTOR, _MAX_HUE, _MAX_REACH = tl.constexpr(MAX_FACTOR), tl.constexpr(MAX_HUE), tl.constexpr(MAX_REACH)
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in GRAY)


@triton.jit
def _factor(row_ptr):
    """A factor of the table; 1, which changes nothing, for one that is out of range or NaN."""
    factor = tl.load(row_ptr)
    return tl.where((factor >= 0) & (factor <= _MAX_FACTOR), factor, 1.0)


@triton.jit
def _hue_turns(row_ptr):
    """By how many turns the hue changes."""
    turns = tl.load(row_ptr + 3)
    return tl.where((turns >= -_MAX_HUE) & (turns <= _MAX_HUE), turns, 0.0)


@triton.jit
def _kinds(row_ptr):
    """The kinds of jitter in their order, two bits for each place."""
    order = tl.load(row_ptr + 4)
    order = tl.where((order >= 0) & (order < 24), order, 0.0).to(tl.int32)
    packed = tl.where(order < 8, _FIRST, tl.where(order < 16, _SECOND, _THIRD))
    return ((packed >> (order % 8 * 8).to(tl.int64)) & 255).to(tl.int32)


@triton.jit
def _gray(red, green, blue):
    return _RED * red + _GREEN * green + _BLUE * blue


@triton.jit
def _clamped(x, most):
    """Between 0 and `most`."""
    return tl.minimum(tl.maximum(x, 0.0), most)


@triton.jit
def _with_hue_turned(red, green, blue, turns):
    """With the hue in sextants, channels are least + chroma * (|h - 3| - 1, 2 - |h - 2|, 2 - |h - 4|)."""
    most = tl.maximum(tl.maximum(red, green), blue)
    least = tl.minimum(tl.minimum(red, green), blue)
    chroma = most - least
    scale = 1.0 / tl.where(chroma > 0, chroma, 1.0)  # of a gray pixel: multiplies zero below
    last = tl.where(most == green, (blue - red) * scale + 2, (red - green) * scale + 4)
    h = tl.where(most == red, (green - blue) * scale, last) + 6 * turns  # -4..8
    h += tl.where(h < 0, 6.0, 0.0)
    h -= tl.where(h >= 6, 6.0, 0.0)
    red = least + chroma * _clamped(tl.abs(h - 3) - 1, 1.0)
    green = least + chroma * _clamped(2 - tl.abs(h - 2), 1.0)
    blue = least + chroma * _clamped(2 - tl.abs(h - 4), 1.0)
    return red, green, blue


@triton.jit
def _jittered(red, green, blue, row_ptr, center, BEFORE_CONTRAST: tl.constexpr):
    """The jitters in the row's order around the mean gray `center`: all four, or those before contrast only."""
    brightness, contrast, saturation = _factor(row_ptr), _factor(row_ptr + 1), _factor(row_ptr + 2)
    turns, kinds = _hue_turns(row_ptr), _kinds(row_ptr)
    active = contrast == contrast  # true; with BEFORE_CONTRAST until contrast is reached
    for place in range(4):
        kind = (kinds >> (2 * place)) & 3
        if BEFORE_CONTRAST:
            active = active & (kind != 1)
        if active:
            if kind == 3:
                if turns != 0:
                    red, green, blue = _with_hue_turned(red, green, blue, turns)
            else:
                factor = tl.where(kind == 0, brightness, tl.where(kind == 1, contrast, saturation))
                if factor != 1:
                    middle = tl.where(kind == 0, 0.0, tl.where(kind == 1, center, _gray(red, green, blue)))
                    rest = middle * (1 - factor)
                    red = _clamped(red * factor + rest, 255.0)
                    green = _clamped(green * factor + rest, 255.0)
                    blue = _clamped(blue * factor + rest, 255.0)
    return red, green, blue


@triton.jit
def _read(pixels_ptr, offs, mask):
    """Red, green and blue at the pixels `offs`."""
    red = tl.load(pixels_ptr + offs * 3, mask=mask, other=0).to(tl.float32)
    green = tl.load(pixels_ptr + offs * 3 + 1, mask=mask, other=0).to(tl.float32)
    blue = tl.load(pixels_ptr + offs * 3 + 2, mask=mask, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _normalized(value, row_ptr, scale, shift):
    """Solarized above the row's threshold, then scaled and shifted."""
    return tl.where(value >= tl.load(row_ptr + 7), 255.0 - value, value) * scale + shift


CHANGE_CONFIGS = [
    triton.Config({"BLOCK": 2048}, num_warps=16),
    triton.Config({"BLOCK": 4096}, num_warps=16),
]


@autotune(CHANGE_CONFIGS, key=["PIXELS"])
@triton.jit
def _change_kernel(
    pixels_ptr,  # [M, PIXELS, 3] uint8
    table_ptr,  # [M, columns] fp32
    planes_ptr,  # [M, 3, PIXELS] fp32, of blurred samples
    out_ptr,  # [M, 3, PIXELS], of the others
    scales,  # of red, green and blue, as the shifts
    shifts,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample: the mean gray that contrast needs, if contrast changes anything; then all jitters and gray."""
    sample = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + sample * _COLUMNS
    own_ptr = pixels_ptr + sample * (3 * PIXELS)
    center = 0.0
    if _factor(row_ptr + 1) != 1:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, PIXELS, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            red, green, blue = _read(own_ptr, offs, offs < PIXELS)
            red, green, blue = _jittered(red, green, blue, row_ptr, 0.0, True)
            total += tl.where(offs < PIXELS, _gray(red, green, blue), 0.0)
        center = tl.sum(total, axis=0) / PIXELS
    for first in range(0, PIXELS, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < PIXELS
        red, green, blue = _read(own_ptr, offs, mask)
        red, green, blue = _jittered(red, green, blue, row_ptr, center, False)
        if tl.load(row_ptr + 5) > 0:
            luminance = _gray(red, green, blue)
            red, green, blue = luminance, luminance, luminance
        offs = sample * (3 * PIXELS) + offs
        if tl.load(row_ptr + 6) > 0:
            tl.store(planes_ptr + offs, red, mask=mask)
            tl.store(planes_ptr + offs + PIXELS, green, mask=mask)
            tl.store(planes_ptr + offs + 2 * PIXELS, blue, mask=mask)
        else:
            store(out_ptr + offs, _normalized(red, row_ptr, scales[0], shifts[0]), mask)
            store(out_ptr + offs + PIXELS, _normalized(green, row_ptr, scales[1], shifts[1]), mask)
            store(out_ptr + offs + 2 * PIXELS, _normalized(blue, row_ptr, scales[2], shifts[2]), mask)


@triton.jit
def _mirrored(at, SIZE: tl.constexpr):
    """Where a position outside of the picture is mirrored to, not repeating the edge."""
    at = tl.abs(at)
    return tl.where(at < SIZE, at, 2 * (SIZE - 1) - at)


BLUR_CONFIGS = [
    triton.Config({"BLOCK": 2048}, num_warps=8),
    triton.Config({"BLOCK": 1024}, num_warps=4),
    triton.Config({"BLOCK": 4096}, num_warps=8),
]


@autotune(BLUR_CONFIGS, key=["PIXELS", "STRIDE"])
@triton.jit
def _blur_kernel(
    planes_ptr,  # [M, 3, PIXELS] fp32
    table_ptr,  # [M, columns] fp32
    out_ptr,  # [M, 3, PIXELS]
    scales,
    shifts,
    PIXELS: tl.constexpr,
    SIZE: tl.constexpr,  # positions along the axis
    STRIDE: tl.constexpr,  # between two of them
    ROOM: tl.constexpr,  # the largest reach that fits the picture
    LAST: tl.constexpr,  # solarize and normalize what is written
    BLOCK: tl.constexpr,
):
    """One channel of BLOCK pixels of a blurred sample along one axis."""
    BLOCKS: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    plane = tl.program_id(0) // BLOCKS
    row_ptr = table_ptr + (plane // 3).to(tl.int64) * _COLUMNS
    sigma = tl.load(row_ptr + 6)
    if sigma > 0:
        offs = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        mask = offs < PIXELS
        own_ptr = planes_ptr + plane.to(tl.int64) * PIXELS
        place = offs // STRIDE % SIZE
        line = offs - place * STRIDE
        value = tl.load(own_ptr + offs, mask=mask, other=0.0)
        total = tl.where(sigma > 0, 1.0, 0.0)  # a scalar of the device, as the loop carries it
        distance = 1
        while distance <= tl.minimum(tl.ceil(3.0 * sigma), ROOM):
            z = distance / sigma
            weight = tl.exp(-0.5 * (z * z))
            before = tl.load(own_ptr + line + _mirrored(place - distance, SIZE) * STRIDE, mask=mask, other=0.0)
            after = tl.load(own_ptr + line + _mirrored(place + distance, SIZE) * STRIDE, mask=mask, other=0.0)
            value += weight * (before + after)
            total += 2 * weight
            distance += 1
        value = value / total
        if LAST:
            channel = plane % 3
            scale = tl.where(channel == 0, scales[0], tl.where(channel == 1, scales[1], scales[2]))
            shift = tl.where(channel == 0, shifts[0], tl.where(channel == 1, shifts[1], shifts[2]))
            value = _normalized(value, row_ptr, scale, shift)
        store(out_ptr + plane.to(tl.int64) * PIXELS + offs, value, mask)


def photometric_fwd(
    pixels: Tensor, table: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Raw arguments as `patchlight::photometric_fwd`."""
    samples, height, width = pixels.shape[:3]
    size = height * width
    out = pixels.new_empty(samples, 3, height, width, dtype=dtype)
    planes = out if dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    rows = torch.empty_like(planes)
    normalization = tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    _change_kernel[(samples,)](pixels, table, planes, out, *normalization, PIXELS=size)
    room = min(MAX_REACH, min(height, width) - 1)
    for source, target, axis, stride, last in ((planes, rows, width, 1, False), (rows, out, height, width, True)):
        _blur_kernel[lambda sizes: (3 * samples * triton.cdiv(size, sizes["BLOCK"]),)](
            source, table, target, *normalization, PIXELS=size, SIZE=axis, STRIDE=stride, ROOM=room, LAST=last
        )
    return out
