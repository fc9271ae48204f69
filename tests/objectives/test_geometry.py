"""Overlap and sampling, with maps that contain their own positions in the source image, and against grid_sample."""

import pytest
import torch
import torch.nn.functional as F

from patchlight.objectives.geometry import overlap, sample_patches, sample_points, sampling_matrices

GRID, OTHER_GRID = (5, 7), (4, 3)


def some_crops(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes [2, count, 4] that overlap, and flips; every combination of flips occurs."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 30, (2, count, 2), generator=generator)
    size = torch.randint(35, 90, (2, count, 2), generator=generator)
    flip = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]).repeat(1, -(-count // 4))[:, :count] > 0
    return torch.cat([corner, size], dim=-1).double(), flip


def places(box: torch.Tensor, flip: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[B, N, 2] the source pixel x, y under the middle of each patch of the crop, mirrored if it is, by loops."""
    out = torch.empty(len(box), *grid, 2, dtype=torch.float64)
    for image, (x, y, w, h) in enumerate(box.tolist()):
        for row in range(grid[0]):
            for column in range(grid[1]):
                source_column = grid[1] - 1 - column if flip[image] else column
                out[image, row, column, 0] = x + (source_column + 0.5) * w / grid[1]
                out[image, row, column, 1] = y + (row + 0.5) * h / grid[0]
    return out.flatten(1, 2)


@pytest.mark.parametrize("points", ["ends", "centers"])
def test_two_crops_are_sampled_at_the_same_positions_of_the_image(points):
    """A map of source positions, sampled at a point, gives the point's source position: the same from both crops."""
    box, flip = some_crops(40)
    shared = overlap(*box)
    assert shared.exists.all()
    read, inside = [], []
    for crop, mirrored, grid in zip(box, flip, (GRID, OTHER_GRID), strict=True):
        at = sampling_matrices(sample_points(shared, crop, mirrored, 6, points), grid)
        weight_sum = (at.rows.sum(-1)[:, :, None] * at.columns.sum(-1)[:, None, :]).flatten(1)  # less near the border
        one_region = type(at)(at.rows.unsqueeze(1), at.columns.unsqueeze(1))
        read.append(sample_patches(places(crop, mirrored, grid), grid, one_region).squeeze(1))
        inside.append((weight_sum - 1).abs() < 1e-12)
    both = inside[0] & inside[1]
    assert 0.3 < both.double().mean() < 1
    torch.testing.assert_close(read[0][both], read[1][both], rtol=0, atol=1e-10)
    (x, y), (w, h) = shared.start.T, shared.size.T
    step = torch.arange(6.0, dtype=torch.float64) / 5 if points == "ends" else (torch.arange(6.0) + 0.5).double() / 6
    expected = torch.stack(
        [
            (x[:, None] + step * w[:, None])[:, None, :].expand(-1, 6, -1),
            (y[:, None] + step * h[:, None])[:, :, None].expand(-1, -1, 6),
        ],
        dim=-1,
    )
    torch.testing.assert_close(read[0][both], expected.flatten(1, 2)[both], rtol=0, atol=1e-10)


def test_corners_of_the_overlap_map_back_through_both_transforms():
    box, flip = some_crops(12, seed=1)
    shared = overlap(*box)
    left, top = shared.start.T
    for (x, y, w, h), mirrored in zip(box.permute(0, 2, 1), flip, strict=True):
        at = sample_points(shared, torch.stack([x, y, w, h], dim=-1), mirrored, 2)
        across = torch.where(mirrored[:, None], 1 - at.x, at.x) * w[:, None] + x[:, None]
        torch.testing.assert_close(across, torch.stack([left, left + shared.size[:, 0]], dim=-1), rtol=0, atol=1e-10)
        down = at.y * h[:, None] + y[:, None]
        torch.testing.assert_close(down, torch.stack([top, top + shared.size[:, 1]], dim=-1), rtol=0, atol=1e-10)


def test_sampling_and_its_gradient_are_those_of_grid_sample():
    """Zero padding, align_corners=False; several regions of a map at once."""
    box, flip = some_crops(6, seed=2)
    shared = overlap(box[0, :, None], box[1].unflatten(0, (2, 3))[[0, 1, 0, 1, 0, 1]])  # three regions of each
    points = sample_points(shared, box[0, :, None], flip[0, :, None], 4)
    at = sampling_matrices(points, GRID)
    grid = torch.stack(
        [points.x[..., None, :].expand(-1, -1, 4, -1), points.y[..., None].expand(-1, -1, -1, 4)], dim=-1
    )
    patches = torch.randn(6, 35, 3, dtype=torch.float64, requires_grad=True)
    maps = patches.mT.unflatten(2, GRID)
    expected = torch.stack(
        [F.grid_sample(maps, 2 * grid[:, region] - 1, align_corners=False) for region in range(3)], dim=1
    )
    expected = expected.flatten(3).mT
    result = sample_patches(patches, GRID, at)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(result)
    gradients = [torch.autograd.grad(out, patches, upstream)[0] for out in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", [(40, 0, 10, 10), (30, 5, 10, 10), (0, 30, 30, 5), (5, 5, 0, 0)])
def test_without_an_overlap_nothing_is_sampled(other):
    """Apart, sharing an edge, or empty: all weights are exactly 0, and nothing is NaN."""
    box = torch.tensor([[0.0, 0.0, 30.0, 30.0], list(other)])
    shared = overlap(box, box.flip(0))
    assert not shared.exists.any()
    at = sampling_matrices(sample_points(shared, box, torch.tensor([False, True]), 3), (1, 2))
    assert torch.equal(at.rows, torch.zeros(2, 3, 1))
    assert torch.equal(at.columns, torch.zeros(2, 3, 2))


def test_a_point_on_the_border_has_half_the_value_and_a_corner_a_quarter():
    """As released: the zeros beyond the border are part of the mean."""
    box = torch.tensor([[3.0, 4.0, 20.0, 10.0]])
    at = sampling_matrices(sample_points(overlap(box, box), box, torch.tensor([False]), 4), (3, 3))
    read = sample_patches(torch.ones(1, 9, 1), (3, 3), type(at)(at.rows[:, None], at.columns[:, None]))
    expected = torch.ones(4, 4)
    expected[[0, 3]] /= 2
    expected[:, [0, 3]] /= 2
    torch.testing.assert_close(read.view(4, 4), expected)


def test_an_unknown_spread_of_points_is_refused():
    box = torch.ones(1, 4)
    with pytest.raises(ValueError, match="points must be one of ends, centers, got 'corners'"):
        sample_points(overlap(box, box), box, torch.tensor([False]), 3, "corners")
