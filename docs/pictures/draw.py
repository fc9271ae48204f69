"""Draws the pictures of docs with the library's own functions: what they show was computed, and can be computed again.

    patchlight train demo                                   # once: the network whose features three of the pictures show
    python docs/pictures/draw.py runs/demo                  # all pictures, into docs/pictures
    python docs/pictures/draw.py runs/demo --only sere      # one of them

Images are procedural, all numbers are seeded. Needs matplotlib (`pip install ".[bench]"`).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import patchlight
from patchlight.data.crop_picture import to_image
from patchlight.data.loaders import build_loader
from patchlight.data.masking import FixedMasks, MaskRule
from patchlight.data.policy import CropPolicy, dino_policy, pqcl_policy, selfpatch_policy
from patchlight.data.procedural import ProceduralSource
from patchlight.evaluation.encoder import Encoder
from patchlight.heads.relation import RelationHead
from patchlight.objectives.contrast import unit_rows
from patchlight.objectives.dino import other_views
from patchlight.objectives.geometry import (
    Points,
    SamplingMatrices,
    overlap,
    relative_positions,
    sample_patches,
    sample_points,
    sampling_matrices,
)
from patchlight.recipes.ours import demo
from patchlight.records import Views
from patchlight_kernels import neighbor_topk

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

HERE = Path(__file__).parent
IMAGES = 24
POLICY = dino_policy()  # for its mean and standard deviation
INK, MUTED, PAPER = "#1f2328", "#656d76", "#fbfbfa"
BLUE, ORANGE, GREEN, RED = "#2f6fde", "#d9730d", "#178f7c", "#d1344b"
WIDTH, DPI, MOST_COLORS, MOST_BYTES = 7.0, 170, 128, 60_000
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.6,
}


class Material:
    """What the pictures are made of: images, crops, and the teacher of a demo run."""

    def __init__(self, run: str, size: int = 224) -> None:
        self.run, self.source = run, ProceduralSource(IMAGES, size, seed=5)

    def crops(self, policy: CropPolicy, seed: int) -> Views:
        return next(build_loader("torchvision", self.source, policy, IMAGES, seed=seed))

    def teacher(self) -> Encoder:
        return patchlight.load_teacher(self.run)


def draw_crops(material: Material) -> plt.Figure:
    """An image with the boxes of its crops, and the crops."""
    dino, pqcl = dino_policy(8), pqcl_policy()
    policy = CropPolicy(dino.global_crops, dino.local_crops, pqcl.query_crops)
    views, image = material.crops(policy, seed=4), 6
    figure, side, small = plt.figure(figsize=(WIDTH, 1.98)), 1.68, 0.53
    first = place(figure, 0.05, side)
    first.imshow(material.source.read(int(views.ids[image])))
    first.set_title("image")
    kinds = [(views.local_crops, ORANGE, 0.9), (views.query_crops, GREEN, 1.6), (views.global_crops, BLUE, 1.8)]
    for crops, color, width in kinds:
        for box in crops.box[:, image]:
            rectangle(first, *box.tolist(), color, width)
    for number, crop in enumerate(views.global_crops.pixels[:, image]):
        axis = place(figure, 1.79 + number * 1.74, side)
        show(axis, crop, BLUE)
        axis.set_title(f"global crop {number + 1}", color=BLUE)
    small_crops = [*((crop, ORANGE) for crop in views.local_crops.pixels), (views.query_crops.pixels[0], GREEN)]
    for number, (crop, color) in enumerate(small_crops):
        row, column = divmod(number, 3)
        axis = place(figure, 5.27 + column * 0.575, small, 0.26 + row * 0.575)
        show(axis, crop[image], color)
        if number in (0, 2):
            title, color = ("local crops,", ORANGE) if number == 0 else ("query crop", GREEN)
            axis.set_title(title, color=color, loc="left" if number == 0 else "right")
    return figure


def draw_dino(material: Material) -> plt.Figure:
    """Which crop of the student learns which crop of the teacher: the weights of `other_views`."""
    views, image = material.crops(dino_policy(8), seed=4), 6
    global_crops, local_crops = views.global_crops.pixels[:, image], views.local_crops.pixels[:, image]
    students = [*global_crops, *local_crops]
    weights = other_views(len(global_crops), torch.zeros(len(students), 1, 1))
    figure, grid = plt.subplots(3, 11, figsize=(WIDTH, 2.05), gridspec_kw={"wspace": 0.12, "hspace": 0.12})
    for axis in grid.flat:
        axis.axis("off")
    grid[0, 0].text(0.5, 0.1, "student →\nteacher ↓", ha="center", va="center", transform=grid[0, 0].transAxes)
    for column, crop in enumerate(students, 1):
        show(grid[0, column], crop, BLUE if column <= 2 else ORANGE)
    for row, crop in enumerate(global_crops, 1):
        show(grid[row, 0], crop, BLUE)
        for column, weight in enumerate(weights[row - 1].tolist(), 1):
            cell = grid[row, column]
            cell.add_patch(Rectangle((0, 0), 1, 1, color=BLUE if weight else "#e6e6e4", alpha=0.85 if weight else 1))
            text = f"1/{round(1 / weight)}" if weight else "same\ncrop"
            cell.text(0.5, 0.5, text, ha="center", va="center", color="white" if weight else MUTED, fontsize=8.5)
            cell.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.98)
    return figure


def draw_ibot(material: Material) -> plt.Figure:
    """Masks of the published rule on global crops: what the teacher sees, and what the student sees."""
    crops = material.crops(selfpatch_policy(0), seed=2).global_crops.pixels
    grid = (14, 14)
    masks = FixedMasks(MaskRule(((0.0, 0.0), (0.3, 0.2))), seed=1)(0, 2, IMAGES, grid, "cpu")
    ratios = masks[0].float().mean(dim=1)
    chosen = [int((ratios - wanted).abs().argmin()) for wanted in (0.0, 0.12, 0.25, 0.38, 0.5)]
    figure, axes = plt.subplots(2, 5, figsize=(WIDTH, 3.1), gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    for column, image in enumerate(chosen):
        mask = masks[0, image].view(grid).numpy()
        for row in axes[:, column]:
            show(row, crops[0, image], MUTED)
        hide(axes[1, column], mask, crops.shape[-1])
        axes[0, column].set_title(f"{mask.mean():.0%} masked")
    axes[0, 0].set_ylabel("teacher")
    axes[1, 0].set_ylabel("student")
    figure.subplots_adjust(0.04, 0.01, 0.995, 0.93)
    return figure


@torch.no_grad()
def draw_contrast(material: Material, rows: int = 8) -> plt.Figure:
    """Cosines of queries and keys: all keys of the batch (MoCo v3), or the own key and a queue (MoBY)."""
    pixels = material.crops(demo().data.crops, seed=6).global_crops.pixels
    teacher = material.teacher()
    queries, keys = (unit_rows(teacher(view).summary) for view in pixels)
    mean = torch.cat([queries, keys]).mean(dim=0)
    queries, keys = unit_rows(queries - mean), unit_rows(keys - mean)  # as a BatchNorm at the end of a head
    batch = queries[:rows] @ keys[:rows].T
    own, queue = batch.diagonal()[:, None], queries[:rows] @ keys[rows:].T
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 2.5), gridspec_kw={"width_ratios": (8, 18)}, layout="constrained"
    )
    gap = torch.full((rows, 1), torch.nan)
    for axis, cosines in ((left, batch), (right, torch.cat([own, gap, queue], dim=1))):
        picture = axis.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_xticks([])
        axis.set_yticks(range(rows), [str(row + 1) for row in range(rows)])
        axis.tick_params(length=0)
    for row in range(rows):
        rectangle(left, row - 0.5, row - 0.5, 1, 1, INK, 1.4)
        rectangle(right, -0.5, row - 0.5, 1, 1, INK, 1.4)
    left.set_title("MoCo v3: keys of the batch")
    right.set_title("MoBY: the own key | keys of earlier images, in a queue")
    left.set_ylabel("queries of view 1")
    figure.colorbar(
        picture, ax=[left, right], location="right", shrink=0.8, aspect=16, label="cosine", ticks=(-1, 0, 1)
    )
    return figure


@torch.no_grad()
def draw_selfpatch(material: Material) -> plt.Figure:
    """Patches, their windows, and the four neighbors that the teacher aggregates."""
    pixels = material.crops(dino_policy(0, 112, global_scale=(0.9, 1.0)), seed=8).global_crops.pixels[1]
    tokens, image = material.teacher().backbone(pixels), 0
    rows, columns = tokens.grid
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6), gridspec_kw={"wspace": 0.05})
    inner, border = [(3, 5), (6, 10), (11, 8)], [(0, 6), (8, 0)]
    cases = (
        ("window 3 x 3", inner, "wrap"),
        ('border="wrap", as released', border, "wrap"),
        ('border="clip"', border, "clip"),
    )
    for axis, (title, patches, rule) in zip(axes, cases, strict=True):
        show(axis, pixels[image], MUTED)
        axis.set_title(title)
        index = neighbor_topk(tokens.patches, tokens.grid, 4, radius=1, border=rule)[image]
        side = pixels.shape[-1] / columns
        for row, column in patches:
            for y, x in window(row, column, rows, columns, rule):
                axis.add_patch(Rectangle((x * side - 0.5, y * side - 0.5), side, side, color="white", alpha=0.35, lw=0))
            for neighbor in index[row * columns + column].tolist():
                rectangle(axis, neighbor % columns * side, neighbor // columns * side, side, side, ORANGE, 1.6)
            rectangle(axis, column * side, row * side, side, side, BLUE, 2.2)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.92)
    return figure


def draw_pqcl(material: Material) -> plt.Figure:
    """The patches of a query crop, where each global crop has them."""
    views = material.crops(pqcl_policy(), seed=9)
    crops, queries = views.global_crops, views.query_crops
    positions = relative_positions(queries, crops, (6, 6), (14, 14))
    outside = ((positions < 0) | (positions > 13)).any(-1).float().mean(-1)  # [2, B]
    mirrored = crops.flip[0] != crops.flip[1]
    image = int((mirrored & (outside[1] > 0.1) & (outside[0] == 0)).float().argmax())
    figure, side = plt.figure(figsize=(WIDTH, 2.05)), 1.5
    first, second, *others = (place(figure, left, side, 0.36) for left in (0.05, 1.65, 3.42, 5.3))
    first.imshow(material.source.read(int(views.ids[image])))
    first.set_title("image")
    rectangle(first, *queries.box[0, image].tolist(), GREEN, 2)
    show(second, queries.pixels[0, image], GREEN)
    second.set_title("query crop: for\nthe teacher only", color=GREEN)
    for number, axis in enumerate(others):
        rectangle(first, *crops.box[number, image].tolist(), BLUE, 1.6)
        axis.imshow(to_image(crops.pixels[number, image], POLICY), extent=(0, 14, 14, 0))
        step = (queries.box[0, image, 2:] / 6) / (crops.box[number, image, 2:] / 14)
        for x, y in positions[number, image].tolist():
            rectangle(axis, x, y, *step.tolist(), GREEN, 0.9)
        low, high = positions[number, image].amin(0) - 0.6, positions[number, image].amax(0) + step + 0.6
        axis.set(xlim=(min(0, low[0]), max(14, high[0])), ylim=(max(14, high[1]), min(0, low[1])))
        axis.set(xticks=[0, 7, 14], yticks=[0, 7, 14])
        axis.tick_params(length=2, labelsize=7.5)
        axis.set_anchor("N")
        for spine in axis.spines.values():
            spine.set_visible(False)
        flipped = ", mirrored" if crops.flip[number, image] else ""
        axis.set_title(f"queries beside\nglobal crop {number + 1}{flipped}", color=BLUE)
    return figure


@torch.no_grad()
def draw_sere(material: Material) -> plt.Figure:
    """The region that two views share, and how one of its points relates to the others in each view."""
    views = material.crops(dino_policy(0, 112, global_scale=(0.35, 1.0)), seed=2)
    crops = views.global_crops
    backbone = material.teacher().backbone
    tokens = [backbone(view) for view in crops.pixels]
    head = RelationHead(tokens[0].patches.shape[-1])  # batch statistics, as in training
    region = overlap(crops.box[0], crops.box[1])
    points = [sample_points(region, box, flip, 13) for box, flip in zip(crops.box, crops.flip, strict=True)]
    image, point = 7, 4 * 13 + 10
    figure, axes = plt.subplots(1, 5, figsize=(WIDTH, 1.8), gridspec_kw={"wspace": 0.08})
    axes[0].imshow(material.source.read(int(views.ids[image])))
    axes[0].set_title("image")
    for box, color in zip(crops.box[:, image], (BLUE, ORANGE), strict=True):
        rectangle(axes[0], *box.tolist(), color, 1.8)
    x, y, w, h = (*region.start[image].tolist(), *region.size[image].tolist())
    axes[0].add_patch(Rectangle((x, y), w, h, color="white", alpha=0.4, lw=0))
    axes[0].set(xticks=[], yticks=[])
    for view, color in enumerate((BLUE, ORANGE)):
        axis, size = axes[1 + view], crops.pixels.shape[-1]
        show(axis, crops.pixels[view, image], color)
        mirrored = ", mirrored" if crops.flip[view, image] else ""
        axis.set_title(f"view {view + 1}{mirrored}", color=color)
        xs, ys = (c[image] * size - 0.5 for c in (points[view].x, points[view].y))
        axis.scatter(*np.meshgrid(xs, ys), s=2, color="white", lw=0)
        axis.scatter(xs[point % 13], ys[point // 13], s=40, marker="x", color=RED, lw=2)
        relation = relations(head(tokens[view].patches).spatial, tokens[view].grid, points[view])[image, point]
        axes[3 + view].imshow(relation.view(13, 13).sqrt().numpy(), cmap="magma")
        axes[3 + view].scatter(point % 13, point // 13, s=40, marker="x", color="white", lw=2)
        axes[3 + view].set_title(f"relations in {view + 1}", color=color)
        axes[3 + view].set(xticks=[], yticks=[])
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.87)
    return figure


def relations(
    patches: Tensor, grid: tuple[int, int], points: Points, heads: int = 3, temperature: float = 0.5
) -> Tensor:
    """[B, points, points] how much each point's features are related to those of the others: SERE's target, mean over heads."""
    at = sampling_matrices(points, grid)
    sampled = sample_patches(patches, grid, SamplingMatrices(at.rows.unsqueeze(1), at.columns.unsqueeze(1))).squeeze(1)
    by_head = sampled.unflatten(-1, (heads, -1)).transpose(1, 2)
    return (by_head @ by_head.mT / (by_head.shape[-1] ** 0.5 * temperature)).softmax(-1).mean(dim=1)


PICTURES: dict[str, Callable[[Material], plt.Figure]] = {
    "crops": draw_crops,
    "dino": draw_dino,
    "ibot": draw_ibot,
    "contrast": draw_contrast,
    "selfpatch": draw_selfpatch,
    "pqcl": draw_pqcl,
    "sere": draw_sere,
}


def place(figure: plt.Figure, left: float, side: float, top: float = 0.26) -> Any:
    """A square part of a figure, in inches from its left and top."""
    width, height = figure.get_size_inches()
    axis = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    axis.set(xticks=[], yticks=[])
    return axis


def show(axis: Any, crop: Tensor, color: str) -> None:
    axis.axis("on")
    axis.imshow(to_image(crop, POLICY))
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=1.6)


def rectangle(axis: Any, x: float, y: float, w: float, h: float, color: str, width: float) -> None:
    axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=color, linewidth=width))


def hide(axis: Any, mask: np.ndarray, size: int) -> None:
    side = size / len(mask)
    for row, column in zip(*mask.nonzero(), strict=True):
        axis.add_patch(Rectangle((column * side - 0.5, row * side - 0.5), side, side, color="#c9c9c6", lw=0.3))


def window(row: int, column: int, rows: int, columns: int, rule: str) -> list[tuple[int, int]]:
    """The 3 x 3 window of a patch, without the patch."""
    around = [(row + y, column + x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    if rule == "wrap":
        return [(y % rows, x % columns) for y, x in around]
    return [(y, x) for y, x in around if 0 <= y < rows and 0 <= x < columns]


def save(figure: plt.Figure, path: Path) -> None:
    """A PNG of few colors, with the most that fit into a small file."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    plt.close(figure)
    image, colors = Image.open(drawn).convert("RGB"), MOST_COLORS
    while True:
        image.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES or colors <= 16:
            return
        colors //= 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished `patchlight train demo`")
    parser.add_argument("--only", nargs="*", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args(arguments)
    material = Material(given.run)
    with matplotlib.rc_context(STYLE):
        for name in given.only:
            torch.manual_seed(0)
            path = given.out / f"{name}.png"
            save(PICTURES[name](material), path)
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
