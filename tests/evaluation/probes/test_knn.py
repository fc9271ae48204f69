"""Weighted k-NN against a version with loops."""

import math

import pytest
import torch

from patchlight.evaluation.probes import knn
from patchlight.evaluation.probes.knn import NearestNeighbors, accuracies, knn_accuracy


def naive(train, train_labels, test, test_labels, k: int, temperature: float) -> float:
    """One test image, one neighbor, one vote at a time, in float64."""
    right = 0
    for features, label in zip(test.double(), test_labels.tolist(), strict=True):
        cosines = [float(features @ other / (features.norm() * other.norm())) for other in train.double()]
        neighbors = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes: dict[int, float] = {}
        for i in neighbors:
            name = int(train_labels[i])
            votes[name] = votes.get(name, 0.0) + math.exp(cosines[i] / temperature)
        right += min(votes, key=lambda name: (-votes[name], name)) == label
    return right / len(test)


def clusters(count: int, noise: float, dim: int = 8, classes: int = 5):
    labels = torch.randint(0, classes, (count,))
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    return (centers[labels] + noise * torch.randn(count, dim)) * torch.rand(count, 1).add(0.5), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_it_agrees_with_loops(temperature, monkeypatch):
    train, test = clusters(83, 1.5), clusters(97, 1.5)
    ks = (1, 7, 20)
    expected = {k: naive(*train, *test, k, temperature) for k in ks}
    assert len(set(expected.values())) > 1
    assert all(0.3 < value < 0.95 for value in expected.values()), "neither trivial nor at chance"
    assert knn_accuracy(*train, *test, ks, temperature) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(knn, "QUERIES", 10)
    monkeypatch.setattr(knn, "BANK", 13)  # the k-th best is found over several pieces
    assert knn_accuracy(*train, *test, ks, temperature) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("order", ["shuffled", "sorted by class", "best last"])
def test_a_streamed_bank_keeps_the_k_best(order, monkeypatch):
    """Whatever comes first: the same similarities as one topk over everything."""
    monkeypatch.setattr(knn, "QUERIES", 8)
    monkeypatch.setattr(knn, "BANK", 64)
    (bank, names), (queries, _) = clusters(500, 1.0), clusters(21, 1.0)
    if order == "sorted by class":
        bank, names = bank[names.argsort()], names.sort().values
    if order == "best last":
        by = (torch.nn.functional.normalize(bank) @ torch.nn.functional.normalize(queries[0], dim=0)).argsort()
        bank, names = bank[by], names[by]
    nearest = NearestNeighbors(queries, 20)
    for piece in torch.arange(500).split(37):
        nearest.add(bank[piece], names[piece])
    found = nearest.result()
    exact = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(bank.double()).T
    best = exact.topk(20, dim=1)
    assert (found.similarity - best.values).abs().max() < 1e-6
    assert torch.equal(found.label, names[best.indices]), "gaps between random cosines are far above rounding"
    halves = [NearestNeighbors(queries, 20) for _ in range(2)]
    for number, half in enumerate(halves):
        half.add(bank[number::2], names[number::2])
    halves[0].merge([halves[1].result()])
    assert torch.equal(halves[0].result().label, found.label), "two ranks find what one does"


def test_equal_features_are_all_neighbors():
    """A collapsed backbone: every similarity is 1, and the result is still defined."""
    nearest = NearestNeighbors(torch.ones(5, 4), 7)
    nearest.add(torch.ones(100, 4), torch.zeros(100, dtype=torch.int64))
    assert (nearest.result().similarity - 1).abs().max() < 1e-6
    assert accuracies(nearest.result(), torch.zeros(5, dtype=torch.int64), (7,), 0.07, 3) == {7: 1.0}


def test_near_neighbors_outvote_many_far_ones():
    angles = torch.tensor([0.1, 0.9, 0.9, 0.9])
    train = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([1, 0, 0, 0])
    test = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([1]), (4,), 0.07) == {4: 1.0}
    assert knn_accuracy(train, labels, test, torch.tensor([1]), (4,), 10.0) == {4: 0.0}, (
        "a high temperature counts heads"
    )


def test_half_precision_features_are_compared_in_full():
    train, test = clusters(60, 1.0), clusters(20, 1.0)
    half = knn_accuracy(train[0].bfloat16(), train[1], test[0].bfloat16(), test[1], (5,))
    exact = knn_accuracy(train[0].bfloat16().float(), train[1], test[0].bfloat16().float(), test[1], (5,))
    assert half == exact


def test_scrambled_labels_are_at_chance():
    train, test = clusters(2000, 0.1), clusters(500, 0.1)
    assert knn_accuracy(*train, *test)[10] > 0.99
    scrambled = knn_accuracy(train[0], train[1][torch.randperm(2000)], *test)[10]
    assert 0.1 < scrambled < 0.3


def test_wrong_inputs_are_named():
    train, test = clusters(9, 0.1), clusters(3, 0.1)
    with pytest.raises(ValueError, match=r"got \(10, 20\) for 9"):
        knn_accuracy(*train, *test)
    with pytest.raises(ValueError, match="test features"):
        knn_accuracy(*train, test[0], test[1][:2], (1,))
