"""Masks: their counts and distribution, and that they are functions of seed and sample only."""

import hashlib

import pytest
import torch
from dispatched import dispatched
from torch._subclasses.fake_tensor import FakeTensorMode

from patchlight.data.masking import FixedMasks, MaskRule, ReleasedMasks, unpack_bits
from patchlight_kernels import extension, force

MIXED = MaskRule(((0.0, 0.0), (0.3, 0.2)))
GRIDS = [(14, 14), (6, 6), (7, 12), (2, 2)]


def draw(masks, batches=40, views=2, batch=8, grid=(14, 14)):
    """[batches * V * B, N] bool of consecutive batches."""
    return torch.cat([masks(i * batch, views, batch, grid, "cpu").flatten(0, 1) for i in range(batches)])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", ["block", "random"])
@pytest.mark.parametrize("ratios", [((0.3, 0.0),), MIXED.ratios, ((0.7, 0.05),), ((1.0, 0.0),)])
def test_every_batch_has_the_same_number_of_masked_patches(ratios, shape, grid):
    masks = FixedMasks(MaskRule(ratios, shape))
    for first in (0, 5, 1000):
        mask = masks(first, 2, 5, grid, "cpu")
        assert mask.shape == (2, 5, grid[0] * grid[1])
        assert mask.sum() == masks.rows(2, 5, grid)


def test_a_fixed_ratio_masks_every_crop_alike():
    assert (draw(FixedMasks()).sum(dim=1) == int(0.3 * 196)).all()


def test_ratios_are_spread_evenly_and_shuffled():
    counts = draw(FixedMasks(MIXED)).sum(dim=1).view(40, 16)
    sorted_counts = counts.sort(dim=1).values
    assert (sorted_counts == sorted_counts[0]).all()  # every batch has the same ratios
    assert (sorted_counts[0, :8] == 0).all()  # half of the crops none
    assert sorted_counts[0, 8:].tolist() == [int(196 * (0.3 + 0.2 * ((2 * i + 1) / 8 - 1))) for i in range(8)]
    assert counts.double().mean(dim=0).std() < 0.35 * counts.double().std()  # for every crop alike


@pytest.mark.parametrize("kind", [FixedMasks, ReleasedMasks])
@pytest.mark.parametrize("shape", ["block", "random"])
def test_masks_are_a_function_of_seed_and_sample(kind, shape):
    masks = kind(MaskRule(shape=shape), seed=3)
    whole = masks(100, 2, 8, (14, 14), "cpu")
    parts = [masks(100 + i, 2, 4, (14, 14), "cpu") for i in (0, 4)]
    assert torch.equal(torch.cat(parts, dim=1), whole)  # however a batch is split
    assert torch.equal(masks(100, 2, 8, (14, 14), "cpu"), whole)
    assert not torch.equal(masks(108, 2, 8, (14, 14), "cpu"), whole)
    assert not torch.equal(kind(MaskRule(shape=shape), seed=4)(100, 2, 8, (14, 14), "cpu"), whole)
    assert not torch.equal(whole[0], whole[1])
    assert len({tuple(row.tolist()) for row in whole.flatten(0, 1)}) == 16


def neighbors_alike(mask):
    """The share of horizontally and vertically adjacent patches that are both masked or both not."""
    grid = mask.view(-1, 14, 14)
    return torch.cat([(grid[:, 1:] == grid[:, :-1]).flatten(), (grid[:, :, 1:] == grid[:, :, :-1]).flatten()]).double()


def test_fixed_blocks_are_as_compact_as_released_ones():
    fixed, released = (neighbors_alike(draw(kind())).mean() for kind in (FixedMasks, ReleasedMasks))
    alone = neighbors_alike(draw(FixedMasks(MaskRule(shape="random")))).mean()
    assert alone < 0.6
    assert released > 0.8
    assert abs(fixed - released) < 0.03


def test_fixed_blocks_favor_no_side_and_cover_the_grid_like_released_ones():
    fixed, released = (
        draw(kind(), batches=200).double().mean(dim=0).view(14, 14) for kind in (FixedMasks, ReleasedMasks)
    )
    error = 5 * (0.25 / 3200) ** 0.5
    for turned in (fixed.flip(0), fixed.flip(1), fixed.T):
        assert (fixed - turned).abs().max() < error * 2**0.5
    assert (fixed - released).abs().max() < 0.1


def test_single_patches_are_drawn_evenly():
    frequency = draw(FixedMasks(MaskRule(shape="random")), batches=200).double().mean(dim=0)
    assert (frequency - 58 / 196).abs().max() < 5 * (0.3 * 0.7 / 3200) ** 0.5


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", [MaskRule(), MIXED, MaskRule(((0.7, 0.05),), "random")])
def test_released_masks_stay_within_their_rows(rule, grid):
    masks = ReleasedMasks(rule)
    most = masks.rows(2, 5, grid)
    assert all(masks(first, 2, 5, grid, "cpu").sum() <= most for first in range(0, 100, 5))


def test_released_blocks_never_reach_across_the_grid():
    masks = ReleasedMasks(MaskRule(((0.5, 0.0),)))
    assert not any(masks.patch_bits(sample, 0, (1, 12)) for sample in range(50))  # no block is lower than one row
    assert any(masks.patch_bits(sample, 0, (2, 12)) for sample in range(50))


def test_bits_become_a_tensor_lowest_bit_first():
    assert unpack_bits([0b101, 1 << 9], 10).int().tolist() == [[1, 0, 1, 0, 0, 0, 0, 0, 0, 0], [0] * 9 + [1]]


RECORDED = {  # the beginning of the masks' SHA-256, before they became an op
    ("block", "fixed", (14, 14)): "fa81104b79a2e53d",
    ("block", "fixed", (7, 12)): "9c0657cd17bc9152",
    ("block", "mixed", (14, 14)): "b18b2ad61a1855ed",
    ("block", "mixed", (7, 12)): "f3d2fd523046ab57",
    ("random", "fixed", (14, 14)): "067a519de2084700",
    ("random", "fixed", (7, 12)): "69e02e43793e786c",
    ("random", "mixed", (14, 14)): "04532d617caca170",
    ("random", "mixed", (7, 12)): "268f1e10fa324e06",
}


@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize(("shape", "ratios", "grid"), RECORDED)
def test_masks_are_those_that_were_recorded(shape, ratios, grid, name):
    if name == "cpp" and (reason := extension.missing("cpp")):
        pytest.skip(reason)
    masks = FixedMasks(MaskRule(MIXED.ratios if ratios == "mixed" else ((0.3, 0.0),), shape), seed=3)
    with force(block_masks=name):
        drawn = torch.cat([masks(first, 2, 16, grid, "cpu").flatten() for first in (0, 16, 10**6, 2**40)])
    digest = hashlib.sha256(drawn.to(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest.startswith(RECORDED[shape, ratios, grid])


def test_the_first_number_may_be_a_tensor():
    masks = FixedMasks(MIXED)
    assert torch.equal(masks(torch.tensor(48), 2, 8, (6, 6), "cpu"), masks(48, 2, 8, (6, 6), "cpu"))
    assert ReleasedMasks.on_host
    assert not FixedMasks.on_host


def test_a_step_draws_its_masks_by_one_operation():
    masks, first = FixedMasks(MIXED), torch.tensor(48)
    masks(first, 2, 8, (6, 6), "cpu")  # makes the counts
    _, counter = dispatched(masks, first, 2, 8, (6, 6), "cpu")
    assert counter.names == ["patchlight::block_masks_fwd"]


def test_masks_are_traced_whole_and_with_fake_tensors():
    masks = FixedMasks(MIXED)

    def draw_at(first):
        return masks(first, 2, 8, (6, 6), "cpu")

    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(draw_at, fullgraph=True, backend=backend)
    for first in (torch.tensor(48), torch.tensor(80)):
        assert torch.equal(compiled(first), draw_at(first))
    assert graphs == [[torch.ops.patchlight.block_masks_fwd.default]]
    with FakeTensorMode() as mode:
        assert draw_at(mode.from_tensor(torch.tensor(0))).shape == (2, 8, 36)
        assert draw_at(7).shape == (2, 8, 36)
    assert torch.equal(draw_at(48), compiled(torch.tensor(48)))  # no fake tensor was kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_what_the_cpu_draws_without_waiting():
    masks, first = FixedMasks(MIXED), torch.tensor(64, device="cuda")
    expected = masks(64, 2, 8, (14, 14), "cpu")
    masks(first, 2, 8, (14, 14), "cuda")  # copies the counts once
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = masks(first, 2, 8, (14, 14), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(drawn.cpu(), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "circle"}, "must be one of block, random, got 'circle'"),
        ({"ratios": ((0.1, 0.2),)}, "0..1"),
        ({"ratios": ((0.9, 0.2),)}, "0..1"),
        ({"ratios": ((0.0, 0.0),)}, "above 0"),
        ({"ratios": ()}, "above 0"),
    ],
)
def test_impossible_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskRule(**arguments)
