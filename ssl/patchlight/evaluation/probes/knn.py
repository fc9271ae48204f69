"""Weighted k-nearest-neighbor classification as DINO does it: exact, in pieces, without training.

The features of the training images (the bank) are compared with all queries in pieces and are never whole in memory. Of
each piece only similarities that reach a query's k-th best so far are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check, check_numbers
from ..encoder import Encoder
from ..features import Reading, encode, encode_batches
from ..images import resize_side
from ..ranks import Ranks
from .labeled import LabeledData


@dataclass(frozen=True)
class KnnProtocol:
    """DINO's weighted k-NN."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """How many neighbors vote."""
    temperature: float = 0.07
    """A vote weighs exp(cosine / temperature)."""
    size: int | None = None
    """Side of the images; None: the size that the position table was made for (224 for the papers' models)."""

    def __post_init__(self) -> None:
        check_numbers(self, size="[1, inf)")
        check(
            bool(self.k) and min(self.k) > 0 and self.temperature > 0,
            "KnnProtocol: k and temperature must be positive",
            f"{self.k} and {self.temperature}",
            "the published values are the defaults",
        )


QUERIES, BANK, GROUP = 1024, 8192, 16  # rows of a block of similarities, its columns, columns that share a maximum


@dataclass(frozen=True, slots=True)
class Neighbors:
    """The nearest images of Q queries, best first."""

    similarity: Tensor  # [Q, k] cosine, fp32; -inf where the bank had fewer than k images
    label: Tensor  # [Q, k] int64


class NearestNeighbors:
    """The k most similar bank images of each query. Memory: the queries, k neighbors per query, a block of similarities."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries = F.normalize(queries.float(), dim=1)  # [Q, D]
        self.k = k
        self.similarity = queries.new_full((len(queries), k), -torch.inf, dtype=torch.float32)
        self.label = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """A piece of the bank: features [n, D] of any scale, labels [n] int64."""
        for bank, bank_labels in zip(features.split(BANK), labels.split(BANK), strict=True):
            bank = F.normalize(bank.to(self.queries.device).float(), dim=1).T
            for first in range(0, len(self.queries), QUERIES):
                rows = slice(first, first + QUERIES)
                self._update(rows, self.queries[rows] @ bank, bank_labels.to(self.label.device))

    def _update(self, rows: slice, similarity: Tensor, labels: Tensor) -> None:
        """Merges a block of similarities [q, n]. Groups of columns whose maximum is below the k-th best are not read."""
        if pad := -similarity.shape[1] % GROUP:
            similarity = F.pad(similarity, (0, pad), value=-torch.inf)
        best = F.max_pool1d(similarity, GROUP)  # [q, groups]
        threshold = self.similarity[rows].amin(1)  # [q] the k-th best so far
        if best.shape[1] >= self.k and torch.isneginf(threshold).any():
            # nothing is kept yet: at least k similarities reach the k-th best maximum
            threshold = torch.maximum(threshold, best.topk(self.k, dim=1).values[:, -1])
        row, group = (best >= threshold[:, None]).nonzero().unbind(1)
        read = similarity.view(-1, GROUP).index_select(0, row * best.shape[1] + group)  # [p, GROUP]
        pair, within = ((read >= threshold[row, None]) & (read > -torch.inf)).nonzero().unbind(1)
        if len(pair):
            row, column = row[pair], group[pair] * GROUP + within
            self._keep_best(rows, row, read[pair, within], labels[column])

    def _keep_best(self, rows: slice, row: Tensor, similarity: Tensor, labels: Tensor) -> None:
        """The k best of those kept so far and of the new ones, which are sorted by their row."""
        kept, kept_labels = self.similarity[rows], self.label[rows]
        counts = torch.bincount(row, minlength=len(kept))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row] + self.k
        width = self.k + int(counts.max())
        all_similarities = kept.new_full((len(kept), width), -torch.inf)
        all_labels = kept_labels.new_full((len(kept), width), -1)
        all_similarities[:, : self.k], all_labels[:, : self.k] = kept, kept_labels
        all_similarities[row, place], all_labels[row, place] = similarity, labels
        self.similarity[rows], index = all_similarities.topk(self.k, dim=1, sorted=False)
        self.label[rows] = all_labels.gather(1, index)

    def merge(self, others: Iterable[Neighbors]) -> None:
        """Adds the neighbors of the same queries in other parts of the bank."""
        for other in others:
            together = torch.cat([self.similarity, other.similarity.to(self.similarity.device)], 1)
            self.similarity, index = together.topk(self.k, dim=1, sorted=False)
            self.label = torch.cat([self.label, other.label.to(self.label.device)], 1).gather(1, index)

    def result(self) -> Neighbors:
        similarity, order = self.similarity.sort(dim=1, descending=True)
        return Neighbors(similarity, self.label.gather(1, order))


def evaluate_knn(
    encoder: Encoder, data: LabeledData, protocol: KnnProtocol, ranks: Ranks, reading: Reading
) -> dict[str, float]:
    """Accuracies by "k<number>"."""
    ks = [k for k in protocol.k if k <= len(data.train)]
    got = f"{protocol.k} for {len(data.train)}"
    check(bool(ks), "k must not exceed the number of training images", got, "use a smaller k or more images")
    nearest, labels = nearest_training_images(encoder, data, max(ks), ranks, reading, protocol.size)
    by_k = accuracies(nearest, labels, ks, protocol.temperature, data.class_count)
    return {f"k{k}": accuracy for k, accuracy in by_k.items()}


def nearest_training_images(
    encoder: Encoder, data: LabeledData, k: int, ranks: Ranks, reading: Reading, size: int | None = None
) -> tuple[Neighbors, Tensor]:
    """Of each readable test image, with its label. The training images' features are compared batch by batch and not kept.

    Every rank compares all test images with its share of the training images; then the ranks merge their neighbors.
    """
    size = size or encoder.input_format.image_size
    sizes = resize_side(size, data.whole), size
    queries, tested = encode(encoder, data.test, ranks, reading, *sizes, data.unreadable, "test images")
    nearest, labels = NearestNeighbors(queries.to(ranks.device), k), torch.from_numpy(data.train.labels)
    pieces: list[tuple[Tensor, Tensor]] = []
    waiting = 0
    training = encode_batches(encoder, data.train, ranks, reading, *sizes, data.unreadable, "training images")
    for summary, numbers in training:
        pieces.append((summary, labels[numbers]))
        waiting += len(numbers)
        if waiting >= BANK:
            nearest.add(*(torch.cat(column) for column in zip(*pieces, strict=True)))
            pieces, waiting = [], 0
    if pieces:
        nearest.add(*(torch.cat(column) for column in zip(*pieces, strict=True)))
    mine = Neighbors(nearest.similarity.cpu(), nearest.label.cpu())
    nearest.merge(other for rank, other in enumerate(ranks.gather(mine)) if rank != ranks.rank)
    return nearest.result(), torch.from_numpy(data.test.labels)[tested]


def vote(neighbors: Neighbors, k: int, temperature: float, classes: int) -> Tensor:
    """The winning class of each query [Q]; its k nearest vote with exp(cosine / temperature). The lower number wins a tie."""
    winners = []
    for similarity, label in zip(
        neighbors.similarity[:, :k].split(QUERIES), neighbors.label[:, :k].split(QUERIES), strict=True
    ):
        votes = torch.zeros(len(label), classes, device=label.device)
        label = label.clamp(min=0)  # where the bank had fewer than k images: these have no weight
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
        check(
            features.ndim == 2 and labels.shape == features.shape[:1] and len(features) > 0,
            f"knn_accuracy: {name} features must be [n, D] and labels [n] with n > 0",
            f"{tuple(features.shape)} and {tuple(labels.shape)}",
            "pass one feature vector and one label per image",
        )
    check(
        bool(k) and min(k) > 0 and max(k) <= len(train),
        "knn_accuracy: k must be between 1 and the number of training images",
        f"{tuple(k)} for {len(train)}",
        "use a smaller k or more images",
    )
