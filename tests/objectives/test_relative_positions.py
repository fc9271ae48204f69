"""Positions of crops relative to each other, checked by mapping points and pictures through both."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dispatched import dispatched

from patchlight.data.policy import pqcl_policy, sample_crops
from patchlight.data.torchvision_loader import cut
from patchlight.objectives.geometry import relative_positions
from patchlight.records import Crops

GRID, QUERY_GRID = (4, 5), (2, 3)


def crops(count: int, batch: int = 3) -> Crops:
    box = torch.rand(count, batch, 4, dtype=torch.float64) * 100 + 20
    return Crops(torch.zeros(count, batch, 3, 1, 1), box, torch.rand(count, batch) < 0.5)


def to_source(x: float, y: float, box, flip) -> tuple[float, float]:
    """From a position in a crop, x and y in [0, 1], mirrored if the crop is, to source pixels."""
    left, top, width, height = box.tolist()
    return left + (1 - x if flip else x) * width, top + y * height


def to_crop(x: float, y: float, box, flip) -> tuple[float, float]:
    """The inverse."""
    left, top, width, height = box.tolist()
    u = (x - left) / width
    return (1 - u if flip else u), (y - top) / height


@pytest.mark.parametrize("anchor", ["corner", "center"])
@pytest.mark.parametrize("flip_aware", [True, False])
def test_patches_lie_where_their_corners_do(flip_aware, anchor):
    global_crops, query_crops = crops(2), crops(3)
    found = relative_positions(query_crops, global_crops, QUERY_GRID, GRID, flip_aware, anchor)
    assert found.shape == (2, 3, 3 * 6, 2)
    rows, columns = QUERY_GRID
    for v, b, number in np.ndindex(2, 3, 18):
        crop, row, column = number // 6, number % 6 // columns, number % 6 % columns
        corners = []
        for dx, dy in np.ndindex(2, 2):
            place = to_source(
                (column + dx) / columns,
                (row + dy) / rows,
                query_crops.box[crop, b],
                flip_aware and query_crops.flip[crop, b],
            )
            u, w = to_crop(*place, global_crops.box[v, b], flip_aware and global_crops.flip[v, b])
            corners.append((u * GRID[1], w * GRID[0]))
        corners = torch.tensor(corners, dtype=torch.float64)
        expected = corners.amin(0) if anchor == "corner" else corners.mean(0) - 0.5
        torch.testing.assert_close(found[v, b, number], expected, rtol=0, atol=1e-10)


def test_no_number_is_copied_from_the_host():
    """`lift_fresh` is dispatched for each tensor made of Python numbers; on a GPU such a copy waits for the device."""
    _, counter = dispatched(relative_positions, crops(3), crops(2), QUERY_GRID, GRID)
    assert len(counter.names) > 10
    assert "aten::lift_fresh" not in counter.names


def test_a_crop_lies_on_its_own_grid():
    global_crops = crops(1)
    for anchor in ("corner", "center"):
        x, y = (
            relative_positions(global_crops, global_crops, GRID, GRID, anchor=anchor)[0].unflatten(1, GRID).unbind(-1)
        )
        torch.testing.assert_close(x, torch.arange(5.0).double().expand(3, 4, 5))
        torch.testing.assert_close(y, torch.arange(4.0).double()[:, None].expand(3, 4, 5))


def test_a_query_patch_has_the_color_of_the_crop_at_its_position():
    """A picture of its own coordinates through the real loader: a query patch has the color that the crop has there."""
    height, width = 200, 240
    ramp = [
        np.broadcast_to(np.linspace(10, 245, n).reshape(s), (height, width))
        for n, s in ((width, (1, -1)), (height, (-1, 1)))
    ]
    image = np.stack([*ramp, ramp[0]], axis=-1).astype(np.uint8)
    policy = pqcl_policy(query_count=2, query_size=32, global_size=64)
    queries = dataclasses.replace(policy.query_crops[0], flip=0.5)  # the formula is for mirrored queries too
    ids = np.arange(24)
    tables = sample_crops(
        dataclasses.replace(policy, query_crops=(queries,)), 0, 0, ids, np.array([[width, height]] * 24)
    )
    by_kind = {}
    for kind, t in tables.items():
        pixels = torch.empty(*t.flip.shape, t.size, t.size, 3, dtype=torch.uint8)
        cut([image] * 24, t, pixels)
        by_kind[kind] = Crops(pixels.movedim(-1, 2).float(), torch.from_numpy(t.box).float(), torch.from_numpy(t.flip))
    global_crops, query_crops = by_kind["global_crops"], by_kind["query_crops"]
    assert 0.2 < global_crops.flip.float().mean() < 0.8
    place = (
        relative_positions(query_crops, global_crops, (4, 4), (8, 8), anchor="center") + 0.5
    )  # [2, 24, 32, 2] patch centers
    inside = ((place > 0.5) & (place < 7.5)).all(-1)
    assert 0.3 < inside.float().mean() < 1
    expected = F.avg_pool2d(query_crops.pixels.flatten(0, 1), 8).unflatten(0, (2, 24)).flatten(3)  # [L, B, 3, n]
    expected = expected.permute(1, 0, 3, 2).flatten(1, 2)  # [B, L * n, 3]
    where = (place / 8 * 2 - 1).flatten(0, 1)[:, :, None]
    found = F.grid_sample(global_crops.pixels.flatten(0, 1), where, align_corners=False)[..., 0].mT.unflatten(
        0, (2, 24)
    )
    off = (found - expected).abs()[inside]
    assert off.max() < 2.5, off.max()  # of 255; a patch is 4 and more


def test_an_unknown_anchor_is_refused():
    with pytest.raises(ValueError, match="anchor must be one of corner, center, got 'middle'"):
        relative_positions(crops(1), crops(1), GRID, GRID, anchor="middle")
