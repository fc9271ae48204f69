"""Scores of segmentation from a confusion matrix: mIoU, aAcc, mAcc, and how well objects of any class are found."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check
from .scenes import IGNORE

_BETA_SQUARED = 0.3  # weight of recall in the F-measure, as in the work that SERE cites for it (Cheng et al. 2015)


def confusion_of(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """How many pixels of each true class (rows) are predicted as which class (columns), [C, C] int64."""
    known = truth != IGNORE
    return torch.bincount(truth[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)


def scores_of(confusion: Tensor, background: bool = False) -> dict[str, float]:
    """mIoU over the classes that are present or predicted, mAcc over the classes that are present, aAcc over pixels.

    background: whether class 0 is the background; then also the scores of all other classes as one.
    """
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
        **(_foreground_scores(confusion) if background else {}),
    }


def _foreground_scores(confusion: Tensor) -> dict[str, float]:
    """IoU and F-measure of the pixels of all objects together; 1 where there are none and none are predicted."""
    found = confusion[1:, 1:].sum().item()
    missed, invented = confusion[1:, 0].sum().item(), confusion[0, 1:].sum().item()
    if not found + missed + invented:
        return {"fgIoU": 1.0, "fgF": 1.0}
    weighted = (1 + _BETA_SQUARED) * found
    return {
        "fgIoU": found / (found + missed + invented),
        "fgF": weighted / (weighted + _BETA_SQUARED * missed + invented),
    }
