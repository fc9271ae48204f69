"""How much self-relations change between two views of an image (SERE, Figures 5 and 6): less is more invariant.

We do not have the paper's supplement, which defines its figure. Here relations are cosines: spatial ones between
features at the same points of the common part of both views, per head; channel ones between channels over a whole view.
A difference is the mean absolute difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ...checks import check
from ...data.policy import dino_policy
from ...data.stored import Source
from ...data.torchvision_loader import TorchvisionLoader
from ...records import Crops
from ..encoder import Encoder
from ..progress import progress
from ..ranks import Ranks
from ..sheets import tile
from .heat import heat_picture
from .patch_features import FRAME_COLOR, SIDE


@dataclass(frozen=True)
class RelationProtocol:
    """Which views are compared, and at which points."""

    images: int = 512
    """How many images of the source; fewer if it has fewer."""
    points: int = 13
    """Points per side of the common part, at the centers of its cells; the paper trains with 13."""
    heads: int | None = None
    """Groups of channels whose spatial relations are compared separately; None: the backbone's heads, 6 of ViT-S."""
    scale: tuple[float, float] = (0.35, 1.0)
    """Area of a view; the paper's global views."""
    size: int | None = None
    """Side of the views; None: the size that the position table was made for."""
    seed: int = 0
    """Of the random views."""

    def __post_init__(self) -> None:
        check(
            self.images > 0 and self.points > 1 and (self.heads is None or self.heads > 0),
            "RelationProtocol: images and heads must be positive and points 2 or more",
            f"{self.images}, {self.heads} and {self.points}",
            "change what does not fit",
        )


def common_points(boxes: Tensor, flips: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Points of the common part of two views, in each view: [2, B, S, S, 2] of (x, y) in -1..1; and whether it exists, [B].

    boxes [2, B, 4] x, y, w, h in the source image; flips [2, B]. Points are the centers of S x S cells.
    """
    low = torch.maximum(boxes[0, :, :2], boxes[1, :, :2])
    high = torch.minimum(boxes[0, :, :2] + boxes[0, :, 2:], boxes[1, :, :2] + boxes[1, :, 2:])
    steps = (torch.arange(points, device=boxes.device) + 0.5) / points
    xy = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)  # [S, S, 2], x first
    places = low[:, None, None] + xy * (high - low)[:, None, None]  # [B, S, S, 2] in the source image
    grids = (places[None] - boxes[:, :, None, None, :2]) / boxes[:, :, None, None, 2:] * 2 - 1
    grids[..., 0] = torch.where(flips[:, :, None, None], -grids[..., 0], grids[..., 0])
    return grids, (high > low).all(1)


def spatial_relations(patches: Tensor, size: tuple[int, int], grid: Tensor, heads: int) -> Tensor:
    """Cosines [B, heads, S^2, S^2] between features of patches [B, N, D] sampled bilinearly at the grid's points."""
    maps = patches.float().transpose(1, 2).unflatten(2, size)
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    unit = F.normalize(sampled.flatten(2).unflatten(1, (heads, -1)), dim=2)  # [B, heads, D / heads, S^2]
    return unit.transpose(2, 3) @ unit


def channel_relations(patches: Tensor) -> Tensor:
    """Cosines [B, D, D] between channels over all patches [B, N, D]."""
    unit = F.normalize(patches.float(), dim=1)
    return unit.transpose(1, 2) @ unit


@dataclass(frozen=True)
class RelationResult:
    """Mean differences, and a sheet of the first pairs."""

    metrics: dict[str, float]
    left_out: int  # pairs of views without a common part
    replaced: int  # images that could not be read: others took their place
    sheet: Image.Image


@torch.no_grad()
def evaluate_relations(
    encoder: Encoder, source: Source, protocol: RelationProtocol, ranks: Ranks, batch: int = 16
) -> RelationResult:
    """Mean absolute differences of spatial and channel relations between two views of each image."""
    heads = protocol.heads or encoder.backbone.heads
    got = f"{heads} and {encoder.width}"
    check(encoder.width % heads == 0, "RelationProtocol.heads must divide the width", got, "change heads")
    size = protocol.size or encoder.input_format.image_size
    policy = dino_policy(0, size, size, protocol.scale)
    policy = replace(policy, mean=encoder.input_format.mean, std=encoder.input_format.std)
    count = min(protocol.images, len(source))
    batch = min(batch, count // ranks.world)
    check(batch > 0, "Every rank needs an image", f"{count} images for {ranks.world} ranks", "use fewer ranks")
    own = protocol.seed, ranks.rank, ranks.world
    loader = TorchvisionLoader(source, policy, batch, *own, device=ranks.device, most_bad=1.0)
    sums, sheet = torch.zeros(3, dtype=torch.float64), None
    rounds = range(count // (batch * ranks.world))
    for _ in progress(rounds, "pairs of views", ranks):
        crops = next(loader).global_crops
        first, second = (encoder(view) for view in crops.pixels)
        grids, shared = common_points(crops.box, crops.flip, protocol.points)
        grids = torch.where(shared[None, :, None, None, None], grids, torch.zeros_like(grids))
        a, b = (
            spatial_relations(encoded.patches, encoded.grid, grid, heads)
            for encoded, grid in zip((first, second), grids, strict=True)
        )
        spatial = (a - b).abs().mean((1, 2, 3))
        channel = (channel_relations(first.patches) - channel_relations(second.patches)).abs().mean((1, 2))
        sums += torch.stack([spatial[shared].sum(), channel[shared].sum(), shared.sum()]).double().cpu()
        if sheet is None:
            rows = shared.nonzero()[:4, 0]
            sheet = draw_relations(encoder, crops, rows, a[rows].cpu(), b[rows].cpu(), protocol.points)
    spatial_sum, channel_sum, pairs = ranks.sum(sums).tolist()
    check(pairs > 0, "Relations need views that overlap", "none that do", "use larger scales")
    assert sheet is not None  # there was at least one round
    done = len(rounds) * batch * ranks.world
    metrics = {"spatial difference": spatial_sum / pairs, "channel difference": channel_sum / pairs}
    replaced = int(ranks.sum(torch.tensor(float(loader.replaced), device=ranks.device)))
    return RelationResult(metrics, done - int(pairs), replaced, sheet)


def draw_relations(encoder: Encoder, crops: Crops, rows: Tensor, a: Tensor, b: Tensor, points: int) -> Image.Image:
    """A row per pair: both views with their common part framed, the relations of its middle in each, all differences."""
    grids, _ = common_points(crops.box, crops.flip, points)
    middle = (points // 2) * points + points // 2
    sheet = []
    for i, row in enumerate(rows.tolist()):
        views = [
            _view(encoder, crops.pixels[v, row], bool(crops.flip[v, row]), grids[v, row], points) for v in range(2)
        ]
        maps = [((r[i].mean(0)[middle] + 0.2) / 1.2).view(points, points) for r in (a, b)]
        difference = (a[i] - b[i]).abs().mean((0, 1)).view(points, points)
        sheet.append([*views, *(_map(m) for m in maps), _map(difference / 0.5)])
    return tile(sheet)


def _view(encoder: Encoder, pixels: Tensor, flip: bool, grid: Tensor, points: int) -> Image.Image:
    """A view without mirroring, with the region of the points framed."""
    if flip:
        pixels, grid = pixels.flip(-1), grid * grid.new_tensor([-1, 1])
    input_format = encoder.input_format
    mean, std = (torch.tensor(channels)[:, None, None] for channels in (input_format.mean, input_format.std))
    image = ((pixels.cpu() * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    cell = 1 / (points - 1)
    low, high = grid.cpu().amin((0, 1)), grid.cpu().amax((0, 1))
    margin = (high - low) * cell / 2
    corners = ((torch.cat([low - margin, high + margin]) + 1) / 2 * SIDE).clamp(0, SIDE - 1).tolist()
    ImageDraw.Draw(picture).rectangle(corners, outline=FRAME_COLOR, width=2)
    return picture


def _map(values: Tensor) -> Image.Image:
    """Values [S, S] as colors."""
    return heat_picture(np.asarray(values)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
