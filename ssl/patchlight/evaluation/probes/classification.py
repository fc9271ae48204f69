"""What the linear probe and fine-tuning share: images changed at random, and counts of what is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .labeled import Subset


class TrainingImages(Dataset):
    """Images changed at random, and their labels."""

    def __init__(self, part: Subset, change: Callable[[np.ndarray], Tensor]) -> None:
        self.part, self.change = part, change

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return self.change(self.part.read(item)), int(self.part.labels[item])


def count_right(logits: Tensor, labels: Tensor, k: tuple[int, ...] = (1, 5)) -> Tensor:
    """How many labels [B] are among the k best of logits [B, C], for each k, and B: [len(k) + 1] float64."""
    best = logits.topk(min(max(k), logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.tensor([*(float(best[:, :n].any(1).sum()) for n in k), len(labels)], dtype=torch.float64)
