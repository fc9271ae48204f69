"""Scores of segmentation from a confusion matrix: mIoU, aAcc, mAcc."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check
from .scenes import IGNORE


def confusion_of(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How many pixels of each true class (rows) are predicted as which class (columns), [C, C] int64."""
    known = truth != IGNORE
    return torch.bincount(truth[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)


def scores_of(confusion: Tensor) -> dict[str, float]:
    """mIoU over the classes that are present or predicted, mAcc over the classes that are present, aAcc over pixels."""
    correct, present, predicted = confusion.diag().double(), confusion.sum(1).double(), confusion.sum(0).double()
    union = present + predicted - correct
    check(
        bool(present.sum()),
        "Segmentation scores need a pixel with a class",
        "none in all test scenes",
        "check the masks",
    )
    return {
        "mIoU": (correct / union)[union > 0].mean().item(),
        "aAcc": (correct.sum() / present.sum()).item(),
        "mAcc": (correct / present)[present > 0].mean().item(),
    }
