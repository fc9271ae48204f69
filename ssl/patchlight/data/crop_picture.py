"""A picture of a batch for people: source images with the boxes of their crops, and the crops."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..records import Crops, Views
from .policy import CropPolicy
from .stored import Source

_COLORS = {"global_crops": "#2f6fde", "local_crops": "#e0862c", "query_crops": "#23967f"}
_SIDE, _GAP, _EDGE = 128, 6, 2  # pixels of a source image's longer side, between images, of a frame


def draw_crops(views: Views, source: Source, policy: CropPolicy, count: int = 4) -> Image.Image:
    """A row for each of the first images: the source with boxes, then its crops in frames of the same colors."""
    rows = [_row(views, source, policy, number) for number in range(min(count, len(views.ids)))]
    width = max(sum(image.width + _GAP for image in row) for row in rows)
    heights = [max(image.height for image in row) + _GAP for row in rows]
    picture = Image.new("RGB", (width - _GAP, sum(heights) - _GAP), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for image in row:
            picture.paste(image, (left, top))
            left += image.width + _GAP
        top += height
    return picture


def _row(views: Views, source: Source, policy: CropPolicy, number: int) -> list[Image.Image]:
    image = Image.fromarray(source.read(int(views.ids[number])))
    scale = _SIDE / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    draw, crop_images = ImageDraw.Draw(small), []
    largest = views.global_crops.pixels.shape[-1]
    for kind, _ in policy.kinds():
        crops: Crops = getattr(views, kind)
        side = max(24, round(_SIDE * crops.pixels.shape[-1] / largest))
        for v in range(len(crops.pixels)):
            x, y, w, h = (crops.box[v, number].cpu() * scale).tolist()
            draw.rectangle((x, y, x + w - 1, y + h - 1), outline=_COLORS[kind], width=_EDGE if side == _SIDE else 1)
            crop_images.append(_frame(to_image(crops.pixels[v, number], policy), side, _COLORS[kind]))
    return [small, *crop_images]


def to_image(pixels: torch.Tensor, policy: CropPolicy) -> Image.Image:
    """Normalized pixels [3, S, S] as an image."""
    mean, std = (torch.tensor(c)[:, None, None] for c in (policy.mean, policy.std))
    values = (pixels.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(values.round().to(torch.uint8).permute(1, 2, 0).numpy().astype(np.uint8))


def _frame(image: Image.Image, side: int, color: str) -> Image.Image:
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle((0, 0, side - 1, side - 1), outline=color, width=_EDGE)
    return image
