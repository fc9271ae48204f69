"""Pictures of patch features: what a patch attends to, what it resembles, and what the features' main directions are."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ...data.stored import Source
from ..encoder import Encoder
from ..images import CenterCrops
from ..sheets import tile
from .attention import class_attention_maps, draw_attention, heat_colors, query_attention_maps, summary_attention_maps

_SIDE = 160  # pixels of a picture in a sheet
_MARK = "#ff3b30"


@dataclass(frozen=True)
class PictureProtocol:
    """What is drawn."""

    images: int = 6
    """How many images, evenly spread over the source."""
    queries: tuple[tuple[float, float], ...] = ((0.5, 0.5), (0.3, 0.3), (0.7, 0.65))
    """Places of query patches (down, right) in an image, from 0 to 1."""
    top: float = 0.1
    """Share of patches that a query's attention is cut to, as in SelfPatch's Figure 1."""
    size: int | None = None
    """Side of the images; null: what the position table is made for."""

    def __post_init__(self) -> None:
        if self.images < 1 or not 0 < self.top <= 1 or not self.queries:
            raise ValueError(
                "PictureProtocol: images must be positive, top in (0, 1] and queries not empty, got"
                f" {self.images}, {self.top} and {self.queries}."
            )
        if any(not 0 <= place < 1 for query in self.queries for place in query):
            raise ValueError(f"PictureProtocol.queries must lie in [0, 1), got {self.queries}.")


@torch.no_grad()
def draw_pictures(
    encoder: Encoder, source: Source, protocol: PictureProtocol, device: torch.device, whole: bool
) -> dict[str, Image.Image]:
    """Sheets by name: class attention, query attention, similarity, principal components."""
    size = (protocol.size or encoder.eyes.image_size) // encoder.patch_size * encoder.patch_size
    ids = np.linspace(0, len(source) - 1, min(protocol.images, len(source))).round().astype(int)
    crops = CenterCrops(source, ids, size, size if whole else round(size * 256 / 224))
    images = torch.stack([crops[i][0] for i in range(len(ids))])
    pixels = encoder.normalize(images.to(device))
    seen = encoder(pixels)
    shown, grid = images.permute(0, 2, 3, 1).numpy(), seen.grid
    numbers = torch.tensor([int(y * grid[0]) * grid[1] + int(x * grid[1]) for y, x in protocol.queries])
    sheets = {}
    backbone = encoder.backbone
    if hasattr(backbone.blocks[-1], "attn"):
        prefix = getattr(backbone, "prefix", int(backbone.has_class_token))
        if backbone.has_class_token:
            maps = class_attention_maps(backbone, backbone.blocks[-1], pixels, prefix)
            sheets["class attention"] = draw_attention(shown, maps.cpu(), grid, _SIDE)
        elif hasattr(encoder.summary, "blocks"):
            maps = summary_attention_maps(encoder.summary, backbone(pixels).patches)
            sheets["class attention"] = draw_attention(shown, maps.cpu(), grid, _SIDE)
        attention = query_attention_maps(backbone, backbone.blocks[-1], pixels, numbers, prefix).mean(1).cpu()
        sheets["query attention"] = draw_queries(shown, attention, numbers, grid, protocol.top)
    sheets["similarity"] = draw_similarities(shown, similarities(seen.patches, numbers).cpu(), numbers, grid)
    sheets["principal components"] = draw_components(shown, principal_components(seen.patches).cpu(), grid)
    return sheets


def top_patches(maps: Tensor, share: float) -> Tensor:
    """Which patches hold the largest values of maps [..., N]: as many as the share says, at least one."""
    count = max(1, round(share * maps.shape[-1]))
    index = maps.topk(count, dim=-1).indices
    return torch.zeros_like(maps, dtype=torch.bool).scatter_(-1, index, True)


def similarities(patches: Tensor, numbers: Tensor) -> Tensor:
    """Cosine of some patches [Q] with all of patches [B, N, D]: [B, Q, N]."""
    unit = F.normalize(patches.float(), dim=-1)
    return torch.einsum("bqd,bnd->bqn", unit[:, numbers], unit)


def principal_components(patches: Tensor) -> Tensor:
    """The three main directions of all images' patches [B, N, D] together, each stretched over its middle 98 %: [B, N, 3]."""
    rows = patches.double().flatten(0, 1)
    rows = rows - rows.mean(0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    directions *= torch.sign(directions.gather(1, directions.abs().argmax(1, keepdim=True)))  # a sign of its own
    values = rows @ directions.T
    low, high = values.quantile(0.01, 0), values.quantile(0.99, 0)
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).unflatten(0, patches.shape[:2]).float()


def draw_queries(
    images: np.ndarray, attention: Tensor, numbers: Tensor, grid: tuple[int, int], top: float
) -> Image.Image:
    """A row per image: the image with its queries, then for each query the patches it looks at most, the rest darkened."""
    rows = []
    for image, maps in zip(images, attention, strict=True):
        row = [_marked(_picture(image), numbers, grid)]
        for number, mask in zip(numbers, top_patches(maps, top), strict=True):
            lit = _cells(mask.float(), grid)[..., None]
            shown = np.asarray(_picture(image)) * (0.22 + 0.78 * lit)
            row.append(_marked(Image.fromarray(shown.round().astype(np.uint8)), number[None], grid))
        rows.append(row)
    return tile(rows)


def draw_similarities(images: np.ndarray, maps: Tensor, numbers: Tensor, grid: tuple[int, int]) -> Image.Image:
    """A row per image: the image with its queries, then each query's cosine with all patches, from -0.2 (dark) to 1 (light)."""
    rows = []
    for image, cosines in zip(images, maps, strict=True):
        row = [_marked(_picture(image), numbers, grid)]
        for number, cosine in zip(numbers, cosines, strict=True):
            row.append(_marked(heat_picture(_cells((cosine + 0.2) / 1.2, grid)), number[None], grid))
        rows.append(row)
    return tile(rows)


def draw_components(images: np.ndarray, components: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Images above, their patches' three main components as red, green and blue below."""
    colors = [np.stack([_cells(c, grid) for c in one.T], -1) for one in components]
    shown = [Image.fromarray((c * 255).round().astype(np.uint8)) for c in colors]
    return tile([[_picture(image) for image in images], shown])


def heat_picture(values: np.ndarray) -> Image.Image:
    """Numbers in 0..1 as colors from dark to light."""
    return Image.fromarray((heat_colors(values.clip(0, 1)) * 255).round().astype(np.uint8))


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def _cells(values: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Values of patches [N] as squares, [side, side]."""
    return F.interpolate(values.view(1, 1, *grid), size=(_SIDE, _SIDE), mode="nearest")[0, 0].numpy()


def _marked(picture: Image.Image, numbers: Tensor, grid: tuple[int, int]) -> Image.Image:
    """The picture with a frame around some patches."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    for number in numbers.tolist():
        y, x = divmod(number, grid[1])
        box = (x * _SIDE / grid[1], y * _SIDE / grid[0], (x + 1) * _SIDE / grid[1] - 1, (y + 1) * _SIDE / grid[0] - 1)
        draw.rectangle(box, outline=_MARK, width=2)
    return picture


def write_page(folder: Path, title: str, sections: Sequence[tuple[str, str, Path]]) -> Path:
    """One HTML file with everything inside: sections of a heading, a sentence, and a PNG file."""
    body = "".join(
        f"<section><h2>{escape(heading)}</h2><p>{escape(sentence)}</p>"
        f'<img alt="{escape(heading, quote=True)}" src="data:image/png;base64,'
        f'{base64.b64encode(png.read_bytes()).decode("ascii")}"></section>'
        for heading, sentence, png in sections
    )
    style = (
        ":root{color-scheme:light dark}body{max-width:1120px;margin:0 auto;padding:36px 24px;font:15px/1.5 system-ui,"
        "sans-serif}h1{font-size:26px;letter-spacing:-.02em}h2{margin:36px 0 2px;font-size:18px}p{margin:0 0 12px;"
        "opacity:.7}img{max-width:100%;border-radius:6px}"
    )
    path = folder / "index.html"
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
    return path


SENTENCES = {
    "class attention": "The image, the mean attention of the image's token over it, each place in the color of the head that"
    " looks there most, then each head alone.",
    "query attention": "The image with its query patches, then for each of them the patches that it attends to most in the"
    " last block (mean over heads).",
    "similarity": "The image with its query patches, then each one's cosine with every patch.",
    "principal components": "The three main directions of all patches of these images, as red, green and blue.",
    "relations": "Two views (mirroring undone) with their common part framed; how the patch in its middle relates to the"
    " common part in each view; and the mean absolute difference of all relations, place by place.",
}
