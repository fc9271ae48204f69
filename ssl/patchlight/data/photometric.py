"""Color jitter, grayscale, blur and solarize of a batch, from a table of numbers: the plain PyTorch version.

It works in float between 0 and 255 without rounding in between, each operation clamped like torchvision's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .policy import JITTER_ORDERS, CropTable

_CHUNK_PIXELS = 1 << 18  # worked on at a time, so that intermediate planes stay in cache


def photometric(pixels: Tensor, table: CropTable) -> Tensor:
    """Changes crops [V, B, 3, S, S] uint8 as the table says; the same shape and type come back."""
    flat = pixels.flatten(0, 1)
    numbers = {
        name: torch.from_numpy(getattr(table, name).reshape(-1))
        for name in ("brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize")
    }
    out = torch.empty_like(flat)
    chunk = max(1, _CHUNK_PIXELS // table.size**2)
    for first in range(0, len(flat), chunk):
        part = slice(first, first + chunk)
        out[part] = _change(flat[part].float(), {name: column[part] for name, column in numbers.items()})
    return out.view_as(pixels)


def _change(x: Tensor, numbers: dict[str, Tensor]) -> Tensor:
    """Images [M, 3, S, S] float in 0..255 to uint8. Writes into x."""
    orders = torch.from_numpy(JITTER_ORDERS)[numbers["order"]]  # [M, 4]
    for place in range(4):
        for kind, (name, neutral, change) in enumerate(_JITTERS):
            rows = ((orders[:, place] == kind) & (numbers[name] != neutral)).nonzero()[:, 0]
            if len(rows):
                x[rows] = change(x[rows], numbers[name][rows, None, None, None])
    rows = numbers["gray"].nonzero()[:, 0]
    if len(rows):
        x[rows] = gray(x[rows]).expand(-1, 3, -1, -1)
    rows = numbers["sigma"].nonzero()[:, 0]
    if len(rows):
        x[rows] = blur(x[rows], numbers["sigma"][rows])
    values = x.round_().to(torch.uint8)
    rows = numbers["solarize"].nonzero()[:, 0]
    if len(rows):
        values[rows] = torch.minimum(values[rows], 255 - values[rows])  # inverts exactly the values of 128 and more
    return values


def gray(x: Tensor) -> Tensor:
    """Luminance [M, 1, S, S] of images [M, 3, S, S]."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 255)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + gray(x).mean((1, 2, 3), keepdim=True) * (1 - factor)).clamp_(0, 255)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + gray(x) * (1 - factor)).clamp_(0, 255)


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of the HSV cone. Channel c of the result is V - C * clamp(min(k, 4 - k), 0, 1), k = 6 hue + n_c."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    scale = chroma.clamp_min(1e-6).reciprocal_()  # of a gray pixel: multiplies zero below
    sextant = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    sextant += 6 * turns[:, 0]
    out = torch.empty_like(x)
    for channel, offset in enumerate((5, 3, 1)):
        k = sextant + offset
        k -= 6 * torch.floor(k / 6)
        out[:, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return out


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with sigma [M] per image, borders mirrored; the kernel reaches three sigmas of the widest one."""
    images, channels, height, width = x.shape
    reach = min(6 if float(sigma.max()) <= 2 else int(3 * float(sigma.max()) + 1), height - 1, width - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # [M * 3, taps]
    planes = F.pad(x, (reach, reach, reach, reach), mode="reflect").flatten(0, 1)[None]
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=images * channels)
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=images * channels)
    return planes.reshape(x.shape)


_JITTERS = (  # in the order of JITTER_ORDERS
    ("brightness", 1.0, brightness),
    ("contrast", 1.0, contrast),
    ("saturation", 1.0, saturation),
    ("hue", 0.0, hue),
)
