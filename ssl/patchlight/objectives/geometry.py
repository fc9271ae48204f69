"""Positions of crops in their image, the overlap of two crops, and their features sampled there.

Boxes are [..., 4] x, y, w, h in source pixels, flips [...] bool, and leading dimensions broadcast. A position in a view is
a part of its side, 0 to 1 from the left and from the top, in the view as the network gets it: mirrored if the crop was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice
from ..records import Crops

ANCHORS = ("corner", "center")
OUTSIDE = -0.5  # a position so far outside that its sample is 0; -2 on the scale of `grid_sample`, as released


@dataclass(frozen=True, slots=True)
class Overlap:
    """The common rectangle of two boxes; start and size without meaning where there is none."""

    start: Tensor  # [..., 2] x, y
    size: Tensor  # [..., 2] w, h
    exists: Tensor  # [...] bool, whether it has an area


@dataclass(frozen=True, slots=True)
class Points:
    """S x S points of a view: every x with every y."""

    xy: Tensor  # [..., 2, S] positions in the view, first x, then y

    @property
    def x(self) -> Tensor:
        return self.xy.select(-2, 0)

    @property
    def y(self) -> Tensor:
        return self.xy.select(-2, 1)


@dataclass(frozen=True, slots=True)
class SamplingMatrices:
    """Bilinear sampling at S x S points of an H x W grid, as two small matrices: rows . map . columns^T."""

    rows: Tensor  # [..., S, H]
    columns: Tensor  # [..., S, W]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Features at the same points of the image, of a student's and a teacher's crop in each place of three dimensions."""

    teacher: Tensor  # [..., points, D]
    student: Tensor  # [..., points, D]
    exist: Tensor  # [...] bool, whether the two crops overlap


def overlap(box: Tensor, other: Tensor) -> Overlap:
    """The common rectangle of two boxes; sharing an edge is not enough."""
    start = torch.maximum(box[..., :2], other[..., :2])
    size = torch.minimum(box[..., :2] + box[..., 2:], other[..., :2] + other[..., 2:]) - start
    return Overlap(start, size, (size > 0).all(dim=-1))


def sample_points(region: Overlap, box: Tensor, flip: Tensor, count: int, points: str = "ends") -> Points:
    """count x count points spread over a region, as positions in the view (box, flip); OUTSIDE if there is no region.

    points: "ends" puts the outermost ones on the region's border, as SERE's released code; "centers" puts one in the
        middle of each of count x count cells, as its paper.
    """
    check_choice("sample_points: points", points, ("ends", "centers"))
    steps = torch.arange(count, dtype=box.dtype, device=box.device)
    steps = steps / (count - 1) if points == "ends" else (steps + 0.5) / count
    offset, size = (region.start - box[..., :2])[..., None], region.size[..., None]
    x, y = (torch.addcmul(offset, steps, size) / box[..., 2:, None]).unbind(-2)
    xy = torch.stack([torch.where(flip[..., None], 1 - x, x), y], dim=-2)
    return Points(torch.where(region.exists[..., None, None], xy, OUTSIDE))


def bilinear_weights(positions: Tensor, cells: int) -> Tensor:
    """[..., S] positions to [..., S, cells]: how much of each cell a point reads. Beyond the border there are zeros.

    A cell's value sits in its middle (align_corners=False); a point on the border reads half of the outermost cell.
    """
    minus_middles = torch.arange(-0.5, -cells, -1, dtype=positions.dtype, device=positions.device)
    return (1 - torch.add(minus_middles, positions[..., None], alpha=cells).abs()).clamp(min=0)


def sampling_matrices(at: Points, grid: tuple[int, int]) -> SamplingMatrices:
    """Matrices that sample a map on `grid` at the points; all 0 where there is no region."""
    if grid[0] == grid[1]:  # both sides at once
        columns, rows = bilinear_weights(at.xy, grid[0]).unbind(-3)
        return SamplingMatrices(rows, columns)
    return SamplingMatrices(bilinear_weights(at.y, grid[0]), bilinear_weights(at.x, grid[1]))


def sample_patches(patches: Tensor, grid: tuple[int, int], at: SamplingMatrices) -> Tensor:
    """Patches [..., N, D] read in R regions each, matrices [..., R, S, H or W]: [..., R, S * S, D], row by row.

    Two products per map, rows first, over all its regions at once; the gradient likewise. In fp32 (or fp64), also under
    autocast: the weights of a bilinear mean would be off by 0.2 % in bf16.
    """
    exact = torch.promote_types(patches.dtype, torch.float32)
    with torch.autocast(patches.device.type, enabled=False):
        maps = patches.to(exact).unflatten(-2, grid)
        rows, columns = at.rows.to(exact), at.columns.to(exact)
        lines = rows.flatten(-3, -2) @ maps.flatten(-2)  # [..., R * S, W * D]
        lines = lines.unflatten(-2, rows.shape[-3:-1]).unflatten(-1, maps.shape[-2:])
        return (columns.unsqueeze(-3) @ lines).flatten(-3, -2)


def to_autocast(x: Tensor) -> Tensor:
    """x in the dtype to which autocast converts the inputs of a matrix product."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def sample(patches: Tensor, grid: tuple[int, int], at: SamplingMatrices) -> Tensor:
    """`sample_patches`, ready for a product."""
    return to_autocast(sample_patches(patches, grid, at))


def global_pairs(
    student: Tensor, teacher: Tensor, box: Tensor, flip: Tensor, grid: tuple[int, int], count: int, points: str
) -> list[Pairs]:
    """Pairs [V, B, 1] for each turn 1 .. V - 1: student view v and teacher view v + turn, counted modulo V, at count x count
    points of the region that they share. student, teacher: [V, B, N, D] of the same crops."""
    box, flip = box.unsqueeze(2), flip.unsqueeze(2)
    turns = range(1, len(box))
    shared = [overlap(box, box.roll(-turn, 0)) for turn in turns]
    at = [sampling_matrices(sample_points(region, box, flip, count, points), grid) for region in shared]
    pairs = []
    for turn, region in zip(turns, shared, strict=True):
        of_teacher = sample(teacher, grid, at[-turn]).roll(-turn, 0)  # its own turn to the student is the opposite one
        pairs.append(Pairs(of_teacher, sample(student, grid, at[turn - 1]), region.exists))
    return pairs


def relative_positions(
    queries: Crops,
    crops: Crops,
    query_grid: tuple[int, int],
    grid: tuple[int, int],
    flip_aware: bool = True,
    anchor: str = "corner",
) -> Tensor:
    """[V, B, L * n, 2] x, y of every patch of L query crops in patches of each of V crops, as the network gets both.

    Query crop after query crop, row by row. Any real number: negative or larger than the grid where the query crop
    reaches outside. A patch of the crop itself has its column and row.

    flip_aware: True takes account of mirrored crops; False ignores the mirroring, as PQCL's released code does.
    anchor: "corner": the patch's top left corner, as in PQCL's code and paper. "center": the patch's center minus
        half a unit; the same for a patch of the crop itself, and without the corner's bias for smaller patches.
    """
    check_choice("relative_positions: anchor", anchor, ANCHORS)
    rows, columns = query_grid
    crop_xy, crop_size = crops.box.unflatten(-1, (2, 2)).unbind(-2)  # [V, B, 2] x, y and width, height
    query_xy, query_size = queries.box.unflatten(-1, (2, 2)).unbind(-2)  # [L, B, 2]
    # Numbers of the host stay operands: a tensor made of them would be a copy that waits for the device.
    unit = torch.stack([size / crop_size[..., axis] for axis, size in ((0, grid[1]), (1, grid[0]))], dim=-1)
    unit = unit[:, None]  # [V, 1, B, 2] patches per source pixel
    side = torch.stack([query_size[..., 0] / columns, query_size[..., 1] / rows], dim=-1)
    step = side * unit  # [V, L, B, 2] side of a query patch
    start = (query_xy - crop_xy[:, None]) * unit  # [V, L, B, 2] corner of the query crop
    column = torch.arange(columns, device=crop_xy.device, dtype=crop_xy.dtype)
    row = torch.arange(rows, device=crop_xy.device, dtype=crop_xy.dtype)
    if flip_aware:
        column = torch.where(queries.flip[..., None], columns - 1 - column, column)  # [L, B, columns]
    x = start[..., :1] + column * step[..., :1]  # [V, L, B, columns]
    y = start[..., 1:] + row * step[..., 1:]  # [V, L, B, rows]
    if flip_aware:
        x = torch.where(crops.flip[:, None, :, None], grid[1] - x - step[..., :1], x)
    if anchor == "center":
        x, y = x + (step[..., :1] - 1) / 2, y + (step[..., 1:] - 1) / 2
    shape = (*x.shape[:3], rows, columns)
    positions = torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], dim=-1)
    return positions.flatten(3, 4).transpose(1, 2).flatten(2, 3)
