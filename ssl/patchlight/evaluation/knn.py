"""Weighted k-nearest-neighbor classification, DINO's first look at features: exact, in pieces, no training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES = 1 << 26  # at a time: 256 MiB


@torch.no_grad()
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
    train, test = (F.normalize(features.float(), dim=1) for features in (train_features, test_features))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = dict.fromkeys(k, 0)
    chunk = max(1, _SIMILARITIES // len(train))
    for rows, labels in zip(test.split(chunk), test_labels.split(chunk), strict=True):
        similarity, index = (rows @ train.T).topk(max(k), dim=1)  # [b, k], best first
        weight, voted = (similarity / temperature).exp(), train_labels[index]
        for count in right:
            votes = torch.zeros(len(rows), classes, device=rows.device)
            votes.scatter_add_(1, voted[:, :count], weight[:, :count])
            right[count] += int((votes.argmax(1) == labels).sum())
    return {count: number / len(test) for count, number in right.items()}


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
