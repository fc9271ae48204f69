"""Label propagation against a version with loops, and against the released code's dense mathematics at a larger size."""

import math

import pytest
import torch
import torch.nn.functional as F

from patchlight.evaluation.davis import propagation
from patchlight.evaluation.davis.propagation import (
    PropagationProtocol,
    kth_largest,
    propagate,
    propagate_frame,
    to_label_map,
)


def with_loops(features, first, protocol):
    """One patch and one candidate at a time, float64."""
    frames = [F.normalize(f.double(), dim=-1) for f in features]
    height, width, _ = frames[0].shape
    labels = [first.double()]
    for t in range(1, len(frames)):
        context = [0, *(s for s in range(max(1, t - protocol.context_frames), t))]
        out = torch.zeros_like(first, dtype=torch.float64)
        for y in range(height):
            for x in range(width):
                found = []
                for s in context:
                    for v in range(height):
                        for u in range(width):
                            if protocol.radius is None or max(abs(v - y), abs(u - x)) <= protocol.radius:
                                found.append((float(frames[t][y, x] @ frames[s][v, u]), labels[s][v, u]))
                found.sort(key=lambda pair: -pair[0])
                bar = found[min(protocol.neighbors, len(found)) - 1][0]
                weights = [(math.exp(c / protocol.temperature), label) for c, label in found if c >= bar]
                out[y, x] = sum(w * label for w, label in weights) / sum(w for w, _ in weights)
        labels.append(out)
    return labels[1:]


@pytest.mark.parametrize(
    "protocol", [PropagationProtocol(2, 3, 1), PropagationProtocol(7, 5, 2, 0.2), PropagationProtocol(1, 200, None)]
)
@pytest.mark.parametrize("tile", [2, 5, 50])
def test_it_agrees_with_loops(protocol, tile, monkeypatch):
    monkeypatch.setattr(propagation, "TILE", tile)
    features = torch.randn(5, 4, 7, 6)
    first = F.one_hot(torch.randint(0, 3, (4, 7)), 3).float()
    for soft, exact in zip(propagate(features, first, protocol), with_loops(features, first, protocol), strict=True):
        assert (soft - exact).abs().max() < 1e-5


def test_it_agrees_with_the_dense_mathematics():
    """Windows at every border, more candidates than one group of columns has, and frames that are similar to each other."""
    protocol, height, width = PropagationProtocol(), 29, 41
    base = torch.randn(height, width, 32)
    context = [
        (F.normalize(base + torch.randn_like(base), dim=-1), torch.rand(height, width, 4).softmax(-1)) for _ in range(8)
    ]
    target = F.normalize(base + torch.randn_like(base), dim=-1)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    near = ((row.flatten()[:, None] - row.flatten()).abs() <= 12) & (
        (column.flatten()[:, None] - column.flatten()).abs() <= 12
    )
    scores = torch.cat([target.flatten(0, 1).double() @ f.flatten(0, 1).double().T for f, _ in context], 1)
    weights = (scores / 0.1).exp() * near.repeat(1, 8)
    weights[weights < weights.topk(5, dim=1).values[:, -1:]] = 0
    dense = weights / weights.sum(1, keepdim=True) @ torch.cat([labels.flatten(0, 1) for _, labels in context]).double()
    assert (propagate_frame(target, context, protocol).flatten(0, 1) - dense).abs().max() < 1e-5


def test_ties_all_vote():
    """Equal features everywhere: every patch is equally similar, and labels mix evenly instead of by position."""
    first = F.one_hot(torch.arange(900).view(30, 30) % 2, 2).float()
    soft = next(propagate(torch.ones(2, 30, 30, 4), first, PropagationProtocol(radius=None)))
    assert (soft - 0.5).abs().max() < 1e-5


def test_the_kth_largest_is_exact():
    for scores in (torch.randn(7, 1003), torch.randint(0, 4, (7, 1003)).float(), -torch.arange(640.0).repeat(2, 1)):
        for k in (1, 5):
            assert torch.equal(kth_largest(scores, k), scores.sort(1, descending=True).values[:, k - 1])


def test_label_maps_are_stretched_per_class():
    soft = torch.zeros(2, 2, 3)
    soft[..., 0] = torch.tensor([[0.9, 0.8], [0.9, 0.9]])  # stretched, 0.8 becomes 0
    soft[..., 1] = torch.tensor([[0.05, 0.1], [0.05, 0.05]])  # and 0.1 becomes 1; class 2 is nowhere
    assert to_label_map(soft, 1).tolist() == [[0, 1], [0, 0]]


def test_grids_must_agree():
    with pytest.raises(ValueError, match=r"got \(4, 4\) and \(4, 5\)"):
        next(propagate(torch.randn(2, 4, 4, 3), torch.rand(4, 5, 2)))
    with pytest.raises(ValueError, match=r"neighbors must be a whole number in .* got 0"):
        PropagationProtocol(neighbors=0)
