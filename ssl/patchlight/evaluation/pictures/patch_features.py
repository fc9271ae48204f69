"""Pictures of patch features: attention, similarities, and main directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader

from ...checks import check
from ...heads.summary import ClassAttentionSummary
from ..encoder import Encoder
from ..images import CenterCrops, Images, Unreadable, check_some, readable, resize_side
from ..sheets import tile
from .attention import (
    class_attention_maps,
    draw_attention,
    has_plain_attention,
    query_attention_maps,
    summary_attention_maps,
)
from .heat import heat_picture, to_picture

SIDE = 160  # pixels of a picture in a sheet
FRAME_COLOR = "#ff3b30"


@dataclass(frozen=True)
class PictureProtocol:
    """Which images and patches are drawn."""

    images: int = 6
    """How many images, evenly spread over the source."""
    queries: tuple[tuple[float, float], ...] = ((0.5, 0.5), (0.3, 0.3), (0.7, 0.65))
    """Places of query patches (down, right) in an image, from 0 to 1."""
    top: float = 0.1
    """Share of patches that a query's picture keeps, those with the highest attention, as in SelfPatch's Figure 1."""
    size: int | None = None
    """Side of the images; None: the size that the position table was made for."""

    def __post_init__(self) -> None:
        check(
            self.images > 0 and 0 < self.top <= 1 and bool(self.queries),
            "PictureProtocol: images must be positive, top in (0, 1] and queries not empty",
            f"{self.images}, {self.top} and {self.queries}",
            "change what does not fit",
        )
        check(
            all(0 <= place < 1 for query in self.queries for place in query),
            "PictureProtocol.queries must lie in [0, 1)",
            self.queries,
            "give places as shares of the sides",
        )


@dataclass(frozen=True)
class Pictures:
    """What was drawn, and what was not and why."""

    sheets: dict[str, Image.Image]  # by name: class attention, query attention, similarity, principal components
    notes: tuple[str, ...]


@torch.no_grad()
def draw_pictures(
    encoder: Encoder, source: Images, protocol: PictureProtocol, device: torch.device, whole: bool
) -> Pictures:
    """All sheets of a ViT with attention to its patches; of other backbones those that need no attention."""
    size = (protocol.size or encoder.input_format.image_size) // encoder.patch_size * encoder.patch_size
    ids = np.linspace(0, len(source) - 1, min(protocol.images, len(source))).round().astype(int)
    crops = CenterCrops(source, ids, size, resize_side(size, whole))
    batches = [images for images, _ in readable(DataLoader(crops, len(ids)), source, Unreadable())]
    check_some(len(batches), crops)
    batch = batches[0]
    pixels = encoder.normalize(batch.to(device))
    encoded = encoder(pixels)
    images, grid = batch.permute(0, 2, 3, 1).numpy(), encoded.grid
    numbers = torch.tensor([int(y * grid[0]) * grid[1] + int(x * grid[1]) for y, x in protocol.queries])
    sheets = _attention_sheets(encoder, pixels, images, numbers, grid, protocol.top)
    cosines = similarities(encoded.patches, numbers).cpu()
    sheets["similarity"] = draw_similarities(images, cosines, numbers, grid)
    sheets["principal components"] = draw_components(images, principal_components(encoded.patches).cpu(), grid)
    return Pictures(sheets, _missing_sheets(encoder))


def _attention_sheets(
    encoder: Encoder, pixels: Tensor, images: np.ndarray, numbers: Tensor, grid: tuple[int, int], top: float
) -> dict[str, Image.Image]:
    """Class attention and query attention, as far as there are such."""
    backbone = encoder.backbone
    sheets = {}
    if _has_class_attention(encoder):
        sheets["class attention"] = draw_attention(images, attention_maps(encoder, pixels).cpu(), grid, SIDE)
    if _has_query_attention(encoder):
        prefix = _prefix_tokens(encoder)
        attention = query_attention_maps(backbone, backbone.blocks[-1], pixels, numbers, prefix).mean(1).cpu()
        sheets["query attention"] = draw_queries(images, attention, numbers, grid, top)
    return sheets


def _has_query_attention(encoder: Encoder) -> bool:
    return encoder.backbone.returns_blocks and has_plain_attention(encoder.backbone.blocks[-1])


def _has_class_attention(encoder: Encoder) -> bool:
    own = encoder.backbone.has_class_token and _has_query_attention(encoder)
    return own or isinstance(encoder.summary, ClassAttentionSummary)


def _missing_sheets(encoder: Encoder) -> tuple[str, ...]:
    """A sentence that names the sheets of attention that cannot be drawn, and why."""
    drawn = {"class attention": _has_class_attention(encoder), "query attention": _has_query_attention(encoder)}
    missing = [name for name, found in drawn.items() if not found]
    if not missing:
        return ()
    if drawn["query attention"]:
        reason = "an image is summed up by the mean of its patches"
    elif encoder.backbone.returns_blocks:
        reason = "the attention of this network's blocks is not that of a plain ViT"
    else:
        reason = "no block attends from a patch to all others: a Swin's attention stays in windows, a ResNet has none"
    return (f"no {' and no '.join(missing)} of {encoder.name}, as {reason}",)


@torch.no_grad()
def attention_maps(encoder: Encoder, pixels: Tensor) -> Tensor:
    """What an image's summary attends to, [B, heads, N]: the class token in the last block, or class attention.

    pixels [B, 3, H, W] as `Encoder.normalize` returns them. Rows sum to less than 1: attention to itself is cut off.
    """
    backbone = encoder.backbone
    if backbone.has_class_token:
        return class_attention_maps(backbone, backbone.blocks[-1], pixels, _prefix_tokens(encoder))
    rule, remedy = "The summary of an image must be attention to its patches", "draw similarities of patches instead"
    got = f"the mean of the patches in {encoder.name}"
    check(isinstance(encoder.summary, ClassAttentionSummary), rule, got, remedy)
    return summary_attention_maps(encoder.summary, backbone(pixels).patches)


def _prefix_tokens(encoder: Encoder) -> int:
    """How many tokens come before the patches."""
    return getattr(encoder.backbone, "prefix_tokens", int(encoder.backbone.has_class_token))


def top_patches(maps: Tensor, share: float) -> Tensor:
    """The patches with the largest values of maps [..., N]: this share of them, at least one. bool."""
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
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions *= torch.sign(largest)  # makes the signs unique
    values = rows @ directions.T
    low, high = values.quantile(0.01, 0), values.quantile(0.99, 0)
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).unflatten(0, patches.shape[:2]).float()


def draw_queries(
    images: np.ndarray, attention: Tensor, numbers: Tensor, grid: tuple[int, int], top: float
) -> Image.Image:
    """A row per image: the image with its queries, then for each query the patches of highest attention, the rest dark."""
    rows = []
    for image, maps in zip(images, attention, strict=True):
        row = [_marked(_picture(image), numbers, grid)]
        for number, mask in zip(numbers, top_patches(maps, top), strict=True):
            brightness = 0.22 + 0.78 * _cells(mask.float(), grid)[..., None]
            pixels = np.asarray(_picture(image)) * brightness
            row.append(_marked(Image.fromarray(pixels.round().astype(np.uint8)), number[None], grid))
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
    below = [to_picture(np.stack([_cells(c, grid) for c in image.T], -1)) for image in components]
    return tile([[_picture(image) for image in images], below])


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _cells(values: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Values of patches [N] as squares, [side, side]."""
    return F.interpolate(values.view(1, 1, *grid), size=(SIDE, SIDE), mode="nearest")[0, 0].numpy()


def _marked(picture: Image.Image, numbers: Tensor, grid: tuple[int, int]) -> Image.Image:
    """The picture with a frame around some patches."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    for number in numbers.tolist():
        y, x = divmod(number, grid[1])
        box = (x * SIDE / grid[1], y * SIDE / grid[0], (x + 1) * SIDE / grid[1] - 1, (y + 1) * SIDE / grid[0] - 1)
        draw.rectangle(box, outline=FRAME_COLOR, width=2)
    return picture
