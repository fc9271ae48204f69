"""block_masks: the random numbers, the counts, and what is refused. What is drawn is tested in tests/data/test_masking.py."""

import pytest
import torch
from parity import every_runner, running

from patchlight.data.random_numbers import random_bits
from patchlight_kernels import block_masks, explain
from patchlight_kernels.ops.block_masks import reference


def test_the_bits_are_those_of_the_loaders():
    samples = torch.tensor([0, 1, 7, 2**40, 2**62])
    theirs = random_bits(5, reference.PURPOSE, samples.numpy()).view("int64").tolist()
    assert reference.random_bits("cpu", 5, reference.PURPOSE, samples).tolist() == theirs
    for seed in (0, 5, -1, 2**62):
        assert reference.purpose_bits(seed) == reference.random_bits("cpu", seed, reference.PURPOSE).item()


@every_runner
@pytest.mark.parametrize("shape", ["block", "random"])
def test_each_crop_masks_one_of_the_counts(shape, device, name):
    counts = torch.tensor([0, 1, 5, 12, 11, 40], dtype=torch.int32)  # the last one is all that there are, 12
    with running(device, name):
        mask = block_masks(torch.tensor(9, device=device), counts.to(device), (3, 4), 2, 1, shape)
    assert sorted(mask.sum(2).flatten().tolist()) == [0, 1, 5, 11, 12, 12]


@every_runner
def test_large_numbers_wrap_alike(device, name):
    """The running number, the seed and the hash use all 64 bits."""
    counts = torch.full((4,), 3, dtype=torch.int32, device=device)
    first, seed = torch.tensor(2**62 + 12345, device=device), -(2**63) + 9
    with running(device, name):
        mask = block_masks(first, counts, (4, 5), 2, seed)
    assert torch.equal(mask.cpu(), reference.block_masks_fwd(first.cpu(), counts.cpu(), seed, 2, 4, 5, True))


def test_ties_go_to_the_lower_index(monkeypatch):
    def zeros(first, *keys):
        return torch.zeros(torch.broadcast_shapes(*(x.shape for x in (first, *keys) if isinstance(x, torch.Tensor))))

    monkeypatch.setattr(reference, "_uniform", zeros)
    counts = torch.tensor([1, 2, 3], dtype=torch.int32)
    mask = reference.block_masks_fwd(torch.tensor(0), counts, 0, 1, 1, 4, False)
    assert mask[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_too_large_batches_are_explained():
    counts = torch.zeros(9000, dtype=torch.int32)
    assert "9000 crops exceed the 8192" in explain("block_masks", torch.tensor(0), counts, (2, 2))
    assert "4900 patches exceed the 4096" in explain("block_masks", torch.tensor(0), counts[:2], (70, 70))


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"first": torch.tensor([0])}, "first must be a single int64"),
        ({"first": torch.tensor(0.0)}, "first must be a single int64"),
        ({"counts": torch.zeros(4)}, "counts must be int32"),
        ({"views": 3}, "views must divide the 4 crops"),
        ({"grid": (0, 4)}, "grid must be"),
        ({"shape": "circle"}, "shape must be one of block, random, got 'circle'"),
        ({"first": torch.tensor(0, device="meta")}, "first must be on cpu"),
    ],
)
def test_wrong_arguments_are_refused(changed, rule):
    right = {"first": torch.tensor(0), "counts": torch.zeros(4, dtype=torch.int32), "grid": (2, 3), "views": 2}
    with pytest.raises(ValueError, match=rule):
        block_masks(**right | changed)
