"""The specification of photometric in plain PyTorch: any device, fp64 in fp64, everything else in fp32.

Values stay between 0 and 255, so that the bytes given are exact; nothing is rounded between two operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .table import GRAY, JITTER_ORDERS, MAX_FACTOR, MAX_HUE, MAX_REACH, PHOTOMETRIC_COLUMNS

_CHUNK_PIXELS = 1 << 18  # computed at a time, so that intermediate planes stay in cache


def photometric_fwd(
    pixels: Tensor, table: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Takes the arguments of `patchlight::photometric_fwd`."""
    samples, height, width = pixels.shape[:3]
    out = pixels.new_empty(samples, 3, height, width, dtype=dtype)
    chunk = max(1, _CHUNK_PIXELS // max(1, height * width))
    with torch.autocast(pixels.device.type, enabled=False):
        for first in range(0, samples if pixels.numel() else 0, chunk):
            part = slice(first, first + chunk)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            out[part] = change(pixels[part].movedim(-1, 1).to(wide), table[part].to(wide), mean, std)
    return out


def change(x: Tensor, table: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images [M, 3, H, W] of values 0..255 as the table [M, COLUMNS] says, normalized."""
    column = dict(zip(PHOTOMETRIC_COLUMNS, table.unbind(1), strict=True))
    amounts = [valid(column[name], name) for name in ("brightness", "contrast", "saturation", "hue")]
    orders = torch.tensor(JITTER_ORDERS, device=x.device)[order_row(column["order"])]  # [M, 4]
    for place in range(4):
        for kind, (operation, amount) in enumerate(zip(_JITTERS, amounts, strict=True)):
            x = _apply(operation, x, (orders[:, place] == kind) & (amount != _NEUTRAL[kind]), amount)
    x = _apply(lambda part, _: gray(part).expand_as(part), x, column["gray"] > 0, column["gray"])
    x = _apply(blur, x, column["sigma"] > 0, column["sigma"])
    x = torch.where(x >= _per_image(column["solarize"]), 255 - x, x)
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=x.dtype, device=x.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=x.dtype, device=x.device)
    return x * scale[:, None, None] + shift[:, None, None]


def valid(amount: Tensor, name: str) -> Tensor:
    """The column with what lies outside its range (and NaN) replaced by the value that changes nothing."""
    low, high = (-MAX_HUE, MAX_HUE) if name == "hue" else (0.0, MAX_FACTOR)
    return torch.where((amount >= low) & (amount <= high), amount, PHOTOMETRIC_COLUMNS[name])


def order_row(order: Tensor) -> Tensor:
    """Rows of JITTER_ORDERS [M] int64; numbers outside of it (and NaN) are row 0."""
    return torch.where((order >= 0) & (order < len(JITTER_ORDERS)), order, 0).long()


def _apply(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, chosen: Tensor, amount: Tensor) -> Tensor:
    """The operation on the chosen images only."""
    rows = chosen.nonzero()[:, 0]
    return x.index_copy(0, rows, operation(x[rows], amount[rows])) if len(rows) else x


def _per_image(amount: Tensor) -> Tensor:
    return amount[:, None, None, None]


def gray(x: Tensor) -> Tensor:
    """Luminance [M, 1, H, W] of images [M, 3, H, W]."""
    return GRAY[0] * x[:, :1] + GRAY[1] * x[:, 1:2] + GRAY[2] * x[:, 2:]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * _per_image(factor)).clamp(0, 255)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    center = gray(x).mean((1, 2, 3), keepdim=True)
    return (x * _per_image(factor) + center * (1 - _per_image(factor))).clamp(0, 255)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * _per_image(factor) + gray(x) * (1 - _per_image(factor))).clamp(0, 255)


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of the HSV cone and keeps value and chroma.

    With the hue in sextants, 0 <= h < 6, channels are least + chroma * (|h - 3| - 1, 2 - |h - 2|, 2 - |h - 4|), the
    bracket clamped to 0..1.
    """
    red, green, blue = x.unbind(1)
    most, least = x.amax(1), x.amin(1)
    chroma = most - least
    scale = 1 / torch.where(chroma > 0, chroma, 1)  # 1 for a gray pixel, where it multiplies zeros
    sextant = torch.where(
        most == red,
        (green - blue) * scale,
        torch.where(most == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    sextant = sextant + 6 * turns[:, None, None]
    sextant = sextant - 6 * torch.floor(sextant / 6)
    share = torch.stack([(sextant - 3).abs() - 1, 2 - (sextant - 2).abs(), 2 - (sextant - 4).abs()], dim=1)
    return least[:, None] + chroma[:, None] * share.clamp(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with sigma [M] per image, as a product with a banded matrix on each side."""
    height, width = x.shape[2:]
    weights = kernel(sigma, min(height, width) - 1)
    return band(weights, height)[:, None] @ x @ band(weights, width)[:, None].transpose(2, 3)


def kernel(sigma: Tensor, limit: int) -> Tensor:
    """Weights [M, 2 * MAX_REACH + 1] for the distances -MAX_REACH..MAX_REACH, summing to 1.

    An image's kernel reaches three sigmas, rounded up, but neither beyond MAX_REACH nor beyond `limit`.
    """
    distance = torch.arange(-MAX_REACH, MAX_REACH + 1, device=sigma.device)
    reach = torch.ceil(3 * sigma.float()).clamp(max=min(MAX_REACH, limit))[:, None]
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2).masked_fill(distance.abs() > reach, 0)
    return weights / weights.sum(1, keepdim=True)


def band(weights: Tensor, size: int) -> Tensor:
    """The matrix [M, size, size] that convolves with the weights, borders mirrored without repeating the edge."""
    source = torch.arange(size, device=weights.device)[:, None] + torch.arange(
        -MAX_REACH, MAX_REACH + 1, device=weights.device
    )
    source = (size - 1 - (size - 1 - source.abs()).abs()).clamp(min=0)  # rows beyond the mirrored ones have no weight
    reads = source[:, :, None] == torch.arange(size, device=weights.device)  # [size, distances, size]
    return torch.einsum("idj,md->mij", reads.to(weights.dtype), weights)


_JITTERS = (brightness, contrast, saturation, hue)
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
