"""Weighted k-nearest-neighbor classification, DINO's first look at features: exact, streamed, no training.

Queries stay; the bank passes by in pieces and is never whole in memory. Of each piece only what beats a query's k-th best
neighbor so far is looked at closely.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoder import Encoder
from ..features import Reading, encode, encode_batches
from ..images import shown
from ..ranks import Ranks
from .labeled import Labelled


@dataclass(frozen=True)
class KnnProtocol:
    """DINO's weighted k-NN."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """How many neighbors vote."""
    temperature: float = 0.07
    """A vote weighs exp(cosine / temperature)."""
    size: int | None = None
    """Side of the images that the backbone sees; null: what its position table is made for (224 for the papers' models)."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or self.temperature <= 0:
            raise ValueError(f"KnnProtocol: k and temperature must be positive, got {self.k} and {self.temperature}.")


QUERIES, BANK, GROUP = 1024, 8192, 16  # rows of a block of similarities, its columns, columns that share a maximum


@dataclass(frozen=True, slots=True)
class Neighbors:
    """The nearest images of Q queries, best first."""

    similarity: Tensor  # [Q, k] cosine, fp32; -inf where the bank had fewer than k images
    label: Tensor  # [Q, k] int64


class NearestNeighbors:
    """Keeps the k most similar bank images of each query while the bank passes by. Memory: queries, k per query, a block."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries = F.normalize(queries.float(), dim=1)  # [Q, D]
        self.k, self.seen = k, 0
        self.similarity = queries.new_full((len(queries), k), -torch.inf, dtype=torch.float32)
        self.label = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Some of the bank: features [n, D] of any scale, labels [n] int64."""
        self.seen += len(features)
        for bank, names in zip(features.split(BANK), labels.split(BANK), strict=True):
            bank = F.normalize(bank.to(self.queries.device).float(), dim=1).T
            for first in range(0, len(self.queries), QUERIES):
                rows = slice(first, first + QUERIES)
                self._update(rows, self.queries[rows] @ bank, names.to(self.label.device))

    def _update(self, rows: slice, similarity: Tensor, names: Tensor) -> None:
        """Merges a block of similarities [q, n]: groups of columns whose maximum cannot beat the k-th best are not read."""
        if pad := -similarity.shape[1] % GROUP:
            similarity = F.pad(similarity, (0, pad), value=-torch.inf)
        best = F.max_pool1d(similarity, GROUP)  # [q, groups]
        bar = self.similarity[rows].amin(1)  # [q] what a newcomer has to reach
        if best.shape[1] >= self.k and torch.isneginf(bar).any():  # at first: k groups reach the k-th best maximum
            bar = torch.maximum(bar, best.topk(self.k, dim=1).values[:, -1])
        row, group = (best >= bar[:, None]).nonzero().unbind(1)
        found = similarity.view(-1, GROUP).index_select(0, row * best.shape[1] + group)  # [p, GROUP]
        pair, within = ((found >= bar[row, None]) & (found > -torch.inf)).nonzero().unbind(1)
        if len(pair):
            row, column = row[pair], group[pair] * GROUP + within
            self._keep(rows, row, found[pair, within], names[column])

    def _keep(self, rows: slice, row: Tensor, found: Tensor, labels: Tensor) -> None:
        """The k best of those kept so far and of the newcomers, which come sorted by their row."""
        mine, my_labels = self.similarity[rows], self.label[rows]
        counts = torch.bincount(row, minlength=len(mine))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row] + self.k
        width = self.k + int(counts.max())
        values = mine.new_full((len(mine), width), -torch.inf)
        names = my_labels.new_full((len(mine), width), -1)
        values[:, : self.k], names[:, : self.k] = mine, my_labels
        values[row, place], names[row, place] = found, labels
        self.similarity[rows], index = values.topk(self.k, dim=1, sorted=False)
        self.label[rows] = names.gather(1, index)

    def merge(self, others: Iterable[Neighbors]) -> None:
        """Takes in what the same queries found in other parts of the bank."""
        for other in others:
            together = torch.cat([self.similarity, other.similarity.to(self.similarity.device)], 1)
            self.similarity, index = together.topk(self.k, dim=1, sorted=False)
            self.label = torch.cat([self.label, other.label.to(self.label.device)], 1).gather(1, index)

    def result(self) -> Neighbors:
        similarity, order = self.similarity.sort(dim=1, descending=True)
        return Neighbors(similarity, self.label.gather(1, order))


def evaluate_knn(
    encoder: Encoder, data: Labelled, protocol: KnnProtocol, ranks: Ranks, reading: Reading
) -> dict[str, float]:
    """Accuracies by "k<number>"."""
    ks = [k for k in protocol.k if k <= len(data.train)]
    if not ks:
        raise ValueError(f"k must not exceed the number of training images, got {protocol.k} for {len(data.train)}.")
    nearest = nearest_training_images(encoder, data, max(ks), ranks, reading, protocol.size)
    found = accuracies(nearest, torch.from_numpy(data.test.labels), ks, protocol.temperature, data.classes)
    return {f"k{k}": accuracy for k, accuracy in found.items()}


def nearest_training_images(
    encoder: Encoder, data: Labelled, k: int, ranks: Ranks, reading: Reading, size: int | None = None
) -> Neighbors:
    """Of each test image. The training images' features are never kept: each batch is compared and forgotten.

    Every rank compares all test images with its share of the training images; then the ranks merge what they found.
    """
    size = size or encoder.eyes.image_size
    sizes = shown(size, data.whole), size
    queries = encode(encoder, data.test, ranks, reading, *sizes, title="test images").to(ranks.device)
    nearest, labels = NearestNeighbors(queries, k), torch.from_numpy(data.train.labels)
    pieces, waiting = [], 0
    for summary, numbers in encode_batches(encoder, data.train, ranks, reading, *sizes, title="training images"):
        pieces.append((summary, labels[numbers]))
        waiting += len(numbers)
        if waiting >= BANK:
            nearest.add(*(torch.cat(column) for column in zip(*pieces, strict=True)))
            pieces, waiting = [], 0
    if pieces:
        nearest.add(*(torch.cat(column) for column in zip(*pieces, strict=True)))
    mine = Neighbors(nearest.similarity.cpu(), nearest.label.cpu())
    nearest.merge(other for rank, other in enumerate(ranks.gather(mine)) if rank != ranks.rank)
    return nearest.result()


def vote(neighbors: Neighbors, k: int, temperature: float, classes: int) -> Tensor:
    """The winning class of each query [Q]; its k nearest vote with exp(cosine / temperature), ties go to the lower number."""
    winners = []
    for similarity, label in zip(
        neighbors.similarity[:, :k].split(QUERIES), neighbors.label[:, :k].split(QUERIES), strict=True
    ):
        votes = torch.zeros(len(label), classes, device=label.device)
        winners.append(votes.scatter_add_(1, label, (similarity / temperature).exp()).argmax(1))
    return torch.cat(winners)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy (0 to 1) by k. The k most similar training images vote with exp(cosine / temperature).

    Features [n, D] of any scale, labels [n] int64. Similarities are fp32 whatever the features are. Among classes with
    equal votes the lower number wins.
    """
    _check(train_features, train_labels, test_features, test_labels, k)
    nearest = NearestNeighbors(test_features, max(k))
    nearest.add(train_features, train_labels)
    return accuracies(
        nearest.result(), test_labels, k, temperature, int(max(train_labels.max(), test_labels.max())) + 1
    )


def accuracies(
    neighbors: Neighbors, labels: Tensor, k: Sequence[int], temperature: float, classes: int
) -> dict[int, float]:
    """Top-1 accuracy (0 to 1) by k."""
    labels = labels.to(neighbors.label.device)
    return {count: (vote(neighbors, count, temperature, classes) == labels).double().mean().item() for count in k}


def _check(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: Sequence[int]) -> None:
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
            raise ValueError(
                f"knn_accuracy: {name} features must be [n, D] and labels [n] with n > 0, got {tuple(features.shape)}"
                f" and {tuple(labels.shape)}; pass one feature vector and one label per image."
            )
    if not k or min(k) < 1 or max(k) > len(train):
        raise ValueError(
            f"knn_accuracy: k must be between 1 and the number of training images, got {tuple(k)} for {len(train)};"
            " use a smaller k or more images."
        )
