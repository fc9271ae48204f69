"""Attention to patches: maps of class tokens, of patches and of summary heads, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable
from colorsys import hsv_to_rgb
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...checks import check
from ..sheets import tile
from .heat import heat_colors, to_picture


def class_attention_maps(run: Callable[[Tensor], object], block: nn.Module, pixels: Tensor, prefix: int = 1) -> Tensor:
    """Attention of the class token to patches in a timm-style block that `run(pixels)` passes through: [B, heads, N].

    The class token is the first of `prefix` tokens that are no patches. Probabilities are those of the block; attention to
    tokens that are no patches is cut off, so rows sum to less than 1.
    """
    return _attention_rows(run, block, pixels, torch.zeros(1, dtype=torch.int64), prefix)[:, :, 0]


def query_attention_maps(
    run: Callable[[Tensor], object], block: nn.Module, pixels: Tensor, patches: Tensor, prefix: int = 1
) -> Tensor:
    """Attention of some patches [Q] (row-major numbers), as in `class_attention_maps`: [B, heads, Q, N]."""
    return _attention_rows(run, block, pixels, patches + prefix, prefix)


def has_plain_attention(block: nn.Module) -> bool:
    """Whether all tokens of a block attend to all others, as in timm's plain ViTs: no windows, no turned queries and keys."""
    attention = getattr(block, "attn", None)
    windows = hasattr(block, "window_size") or hasattr(attention, "window_size")
    return all(hasattr(attention, name) for name in ("qkv", "num_heads", "scale")) and not (
        windows or hasattr(attention, "rope")
    )


@torch.no_grad()
def _attention_rows(
    run: Callable[[Tensor], object], block: nn.Module, pixels: Tensor, tokens: Tensor, prefix: int
) -> Tensor:
    """Rows of a block's attention probabilities, [B, heads, len(tokens), N].

    The block has norm1 and attn with qkv, num_heads and scale, as timm's plain ViTs have.
    """
    attention: Any = getattr(block, "attn", None)  # of timm
    check(
        has_plain_attention(block),
        "Attention can be drawn for plain ViT blocks (qkv, num_heads, scale)",
        type(attention or block).__name__,
        "use patch similarities for this model",
    )
    inputs: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        run(pixels)
    finally:
        handle.remove()
    check(
        bool(inputs),
        "class_attention_maps: run(pixels) must pass through the block",
        "a run that does not",
        "pass a block of the model that runs",
    )
    x = block.get_submodule("norm1")(inputs[0])
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    q, k = getattr(attention, "q_norm", nn.Identity())(q), getattr(attention, "k_norm", nn.Identity())(k)
    scores = torch.einsum("bqhe,bnhe->bhqn", q[:, tokens.to(q.device)], k) * attention.scale
    return scores.float().softmax(-1)[..., prefix:]


@torch.no_grad()
def summary_attention_maps(summary: nn.Module, patches: Tensor) -> Tensor:
    """Attention of the last block of a ClassAttentionSummary to patches [B, N, D]: [B, heads, N].

    Attention of the summary to itself is cut off, so rows sum to less than 1.
    """
    head: Any = summary  # compiled or sharded modules have classes of their own
    state = head.cls_token.flatten(0, 1).expand(len(patches), -1)
    for block in head.blocks[:-1]:
        state = block(patches, state)
    block = head.blocks[-1]
    tokens = block.norm1(torch.cat([state.unsqueeze(1).to(patches.dtype), patches], 1))
    q, k = (project(x).unflatten(-1, (block.heads, -1)) for project, x in ((block.q, tokens[:, :1]), (block.k, tokens)))
    scores = torch.einsum("bhe,bnhe->bhn", q[:, 0], k) * k.shape[-1] ** -0.5
    return scores.float().softmax(-1)[:, :, 1:]


def draw_attention(images: np.ndarray, attention: Tensor, grid: tuple[int, int], height: int = 128) -> Image.Image:
    """A row per image: the image, the mean attention over it, the heads in colors over it, then each head alone.

    images [B, H, W, 3] uint8, attention [B, heads, N] with N = rows * columns of the grid. Every map is stretched from
    its lowest to its highest value.
    """
    batch, _, patches = attention.shape
    check(
        len(images) == batch and grid[0] * grid[1] == patches,
        "draw_attention: attention [B, heads, rows * columns] must fit images and grid",
        f"{tuple(attention.shape)} for {len(images)} images and grid {grid}",
        "pass the grid of the same crops",
    )
    size = (height, round(height * images.shape[2] / images.shape[1]))
    maps = F.interpolate(attention.float().cpu().unflatten(2, grid), size=size, mode="nearest")
    rows = []
    for image, heads in zip(images, maps.numpy(), strict=True):
        picture = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)) / 255
        mean, heads = _stretched(heads.mean(0)), _stretched(heads)
        row = [picture, _over(picture, mean), _head_colors(picture, heads), *map(heat_colors, heads)]
        rows.append([to_picture(values) for values in row])
    return tile(rows)


def _stretched(maps: np.ndarray) -> np.ndarray:
    """Each map [..., height, width] from its lowest value (0) to its highest (1)."""
    low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
    return (maps - low) / np.maximum(high - low, 1e-12)


def _over(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The picture in gray, covered by colors where there is attention."""
    gray = np.repeat(picture.mean(2, keepdims=True) * 0.6, 3, 2)
    cover = values[:, :, None] * 0.85
    return gray * (1 - cover) + heat_colors(values) * cover


def _head_colors(picture: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Each place in the color of the head with the highest attention there, the stronger the higher it is."""
    colors = np.array([hsv_to_rgb(head / len(heads), 0.75, 1.0) for head in range(len(heads))])
    strongest = heads.argmax(0)
    cover = np.take_along_axis(heads, strongest[None], 0)[0][:, :, None] ** 0.7 * 0.8
    return picture * 0.5 * (1 - cover) + colors[strongest] * cover
