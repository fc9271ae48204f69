"""Pictures of where class attention looks: on each head alone, and on all of them, over the image."""

from __future__ import annotations

from collections.abc import Callable
from colorsys import hsv_to_rgb

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

_GAP = 4  # pixels between the pictures of a sheet
_HEAT = np.array([[0.05, 0.03, 0.2], [0.45, 0.1, 0.43], [0.85, 0.25, 0.3], [0.98, 0.6, 0.2], [0.99, 0.98, 0.7]])


def class_attention_maps(run: Callable[[Tensor], object], block: nn.Module, pixels: Tensor, prefix: int = 1) -> Tensor:
    """Where the class token looks in a timm-style block while `run(pixels)` passes through it: [B, heads, N].

    The class token is the first of `prefix` tokens that are no patches. Probabilities are those of the block; the looks at
    tokens that are no patches are cut off, so rows sum to less than 1.
    """
    return _attention_rows(run, block, pixels, torch.zeros(1, dtype=torch.int64), prefix)[:, :, 0]


def query_attention_maps(
    run: Callable[[Tensor], object], block: nn.Module, pixels: Tensor, patches: Tensor, prefix: int = 1
) -> Tensor:
    """Where some patches [Q] (row-major numbers) look, as `class_attention_maps`: [B, heads, Q, N]."""
    return _attention_rows(run, block, pixels, patches + prefix, prefix)


@torch.no_grad()
def _attention_rows(
    run: Callable[[Tensor], object], block: nn.Module, pixels: Tensor, tokens: Tensor, prefix: int
) -> Tensor:
    """Rows of a block's attention probabilities, [B, heads, len(tokens), N].

    The block has norm1 and attn with qkv, num_heads and scale, as timm's plain ViTs have.
    """
    attention = block.attn
    if not all(hasattr(attention, name) for name in ("qkv", "num_heads", "scale")) or hasattr(attention, "rope"):
        raise ValueError(
            f"Attention can be drawn for plain ViT blocks (qkv, num_heads, scale), got {type(attention).__name__}; use"
            " patch similarities for this model."
        )
    kept: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    try:
        run(pixels)
    finally:
        handle.remove()
    if not kept:
        raise ValueError(
            "class_attention_maps: run(pixels) must pass through the block, got a run that does not; pass a block of"
            " the model that runs."
        )
    q, k, _ = attention.qkv(block.norm1(kept[0])).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    q, k = getattr(attention, "q_norm", nn.Identity())(q), getattr(attention, "k_norm", nn.Identity())(k)
    scores = torch.einsum("bqhe,bnhe->bhqn", q[:, tokens.to(q.device)], k) * attention.scale
    return scores.float().softmax(-1)[..., prefix:]


@torch.no_grad()
def summary_attention_maps(summary: nn.Module, patches: Tensor) -> Tensor:
    """Where the last class-attention block of a summary head looks in patches [B, N, D]: [B, heads, N].

    The look of the summary at itself is cut off, so rows sum to less than 1.
    """
    state = summary.cls_token.expand(len(patches), -1, -1)
    for block in summary.blocks[:-1]:
        state, _ = block(patches, state)
    block = summary.blocks[-1]
    tokens = block.norm1(torch.cat([state.to(patches.dtype), patches], 1))
    q, k = (project(x).unflatten(-1, (block.heads, -1)) for project, x in ((block.q, tokens[:, :1]), (block.k, tokens)))
    scores = torch.einsum("bhe,bnhe->bhn", q[:, 0], k) * k.shape[-1] ** -0.5
    return scores.float().softmax(-1)[:, :, 1:]


def draw_attention(images: np.ndarray, attention: Tensor, grid: tuple[int, int], height: int = 128) -> Image.Image:
    """A row per image: the image, the mean attention over it, the heads in colors over it, then each head alone.

    images [B, H, W, 3] uint8, attention [B, heads, N] with N = rows * columns of the grid. Every map is stretched from
    its lowest to its highest value.
    """
    batch, _, patches = attention.shape
    if len(images) != batch or grid[0] * grid[1] != patches:
        raise ValueError(
            f"draw_attention: attention [B, heads, rows * columns] must fit images and grid, got"
            f" {tuple(attention.shape)} for {len(images)} images and grid {grid}; pass the grid of the same crops."
        )
    size = (height, round(height * images.shape[2] / images.shape[1]))
    maps = F.interpolate(attention.float().cpu().unflatten(2, grid), size=size, mode="nearest")
    rows = []
    for image, heat in zip(images, maps.numpy(), strict=True):
        picture = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)) / 255
        mean, heads = _stretched(heat.mean(0)), _stretched(heat)
        rows.append([picture, _over(picture, mean), _head_colors(picture, heads), *map(heat_colors, heads)])
    return Image.fromarray((_sheet(rows) * 255).round().astype(np.uint8))


def _stretched(maps: np.ndarray) -> np.ndarray:
    """Each map [..., height, width] from its lowest value (0) to its highest (1)."""
    low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
    return (maps - low) / np.maximum(high - low, 1e-12)


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 as colors from dark to light."""
    places = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(values, places, _HEAT[:, channel]) for channel in range(3)], -1)


def _over(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The picture in gray, covered by colors as much as there is attention."""
    gray = np.repeat(picture.mean(2, keepdims=True) * 0.6, 3, 2)
    cover = values[:, :, None] * 0.85
    return gray * (1 - cover) + heat_colors(values) * cover


def _head_colors(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Each place in the color of the head that looks there most, as far as any does."""
    colors = np.array([hsv_to_rgb(head / len(heat), 0.75, 1.0) for head in range(len(heat))])
    strongest = heat.argmax(0)
    cover = np.take_along_axis(heat, strongest[None], 0)[0][:, :, None] ** 0.7 * 0.8
    return picture * 0.5 * (1 - cover) + colors[strongest] * cover


def _sheet(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures of one size in rows, with gaps."""
    height, width, _ = rows[0][0].shape
    step_y, step_x = height + _GAP, width + _GAP
    sheet = np.ones((len(rows) * step_y - _GAP, len(rows[0]) * step_x - _GAP, 3))
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet[r * step_y : r * step_y + height, c * step_x : c * step_x + width] = picture
    return sheet
