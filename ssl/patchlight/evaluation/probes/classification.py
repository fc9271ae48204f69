"""What the linear probe and fine-tuning share: randomly changed training images, and the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..features import Reading
from ..images import CenterBatches, CenterCrops, check_some, readable, resize_side
from ..ranks import Ranks
from .labeled import LabeledData, LabeledImages


class TrainingImages(Dataset):
    """Images after a random change, and their labels."""

    def __init__(self, images: LabeledImages, change: Callable[[np.ndarray], Tensor]) -> None:
        self.images, self.change = images, change

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return self.change(self.images.read(item)), int(self.images.labels[item])


@torch.no_grad()
def count_test_images(
    classify: Callable[[Tensor], Sequence[Tensor]],
    classifiers: int,
    data: LabeledData,
    size: int,
    ranks: Ranks,
    reading: Reading,
) -> Tensor:
    """`count_correct` of each classifier over the readable test images of all ranks, [classifiers, 3].

    classify: logits [B, C] of each classifier for images [B, 3, size, size] uint8.
    """
    counts = torch.zeros(classifiers, 3, dtype=torch.float64)
    crops = CenterCrops(data.test, ranks.share(len(data.test)), size, resize_side(size, data.whole))
    all_labels = torch.from_numpy(data.test.labels)
    batches = CenterBatches(crops, reading.batch, reading.workers)
    for images, numbers in readable(batches, data.test, data.unreadable):
        labels = all_labels[numbers].to(ranks.device)
        counts += torch.stack([count_correct(logits, labels) for logits in classify(images)])
    counts = ranks.sum(counts)
    check_some(float(counts[0, -1]), data.test)
    return counts


def count_correct(logits: Tensor, labels: Tensor, k: tuple[int, ...] = (1, 5)) -> Tensor:
    """How many labels [B] are among the k best of logits [B, C], for each k, and B: [len(k) + 1] float64."""
    best = logits.topk(min(max(k), logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.tensor([*(float(best[:, :n].any(1).sum()) for n in k), len(labels)], dtype=torch.float64)
