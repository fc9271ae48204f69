"""The DAVIS 2017 scores: region similarity J, contour accuracy F, and their mean, recall and decay per object."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

VOID = 255  # a label that counts neither way
_REACH = 0.008  # of the image's diagonal: how far a contour may be off
_RECALL = 0.5


@dataclass(frozen=True)
class Statistics:
    """Of one measure of one object over the frames of its sequence."""

    mean: float
    recall: float  # share of frames above 0.5
    decay: float  # mean of the first quarter minus mean of the last


@dataclass(frozen=True)
class SequenceScores:
    """J and F of O objects in T frames."""

    j: np.ndarray  # [O, T] float64
    f: np.ndarray  # [O, T] float64

    def statistics(self) -> list[tuple[Statistics, Statistics]]:
        """Of J and F, per object."""
        return [(statistics(j), statistics(f)) for j, f in zip(self.j, self.f, strict=True)]


def region_similarity(truth: np.ndarray, result: np.ndarray, void: np.ndarray | None = None) -> float:
    """J: intersection over union of two masks [H, W]; 1 if both are empty. Void pixels are left out of both."""
    truth, result = truth.astype(bool), result.astype(bool)
    if void is not None:
        truth, result = truth & ~void, result & ~void
    union = np.count_nonzero(truth | result)
    return np.count_nonzero(truth & result) / union if union else 1.0


def contour_accuracy(truth: np.ndarray, result: np.ndarray, void: np.ndarray | None = None) -> float:
    """F: harmonic mean of how much of each contour lies near the other; 1 if neither has one, 0 if one has none."""
    truth, result = truth.astype(bool), result.astype(bool)
    if void is not None:
        truth, result = truth & ~void, result & ~void
    truth_edge, result_edge = contour(truth), contour(result)
    truth_count, result_count = np.count_nonzero(truth_edge), np.count_nonzero(result_edge)
    if not truth_count or not result_count:
        return float(truth_count == result_count)
    reach = int(np.ceil(_REACH * np.hypot(*truth.shape)))
    rows, columns = (np.flatnonzero((truth_edge | result_edge).any(axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # nothing outside matters
    truth_edge, result_edge = truth_edge[box], result_edge[box]
    precision = np.count_nonzero(result_edge & dilated(truth_edge, reach)) / result_count
    recall = np.count_nonzero(truth_edge & dilated(result_edge, reach)) / truth_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower, or lower right neighbor; there is none beyond the border."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within a disk's reach of the mask, [H, W] bool."""
    height, width = mask.shape
    sums = np.zeros((height, width + 2 * radius + 1), np.int32)  # running count of each row, radius zeros on both sides
    np.cumsum(mask, 1, out=sums[:, radius + 1 : radius + 1 + width])
    sums[:, radius + 1 + width :] = sums[:, radius + width : radius + width + 1]
    out = np.zeros_like(mask)
    for dy in range(min(radius, height - 1) + 1):
        half = int(np.sqrt(radius * radius - dy * dy))
        first = radius - half
        near = sums[:, first + 2 * half + 1 : first + 2 * half + 1 + width] > sums[:, first : first + width]
        out[dy:] |= near[: height - dy]
        out[: height - dy] |= near[dy:]
    return out


def statistics(values: np.ndarray) -> Statistics:
    """Of one measure over frames [T]."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    quarters = [values[a : b + 1].mean() for a, b in pairwise(ends)]
    return Statistics(float(values.mean()), float((values > _RECALL).mean()), float(quarters[0] - quarters[-1]))


def score_frames(truth: np.ndarray, result: np.ndarray) -> SequenceScores:
    """Scores of label maps [T, H, W], 0 the background. Objects that the result lacks score as empty masks."""
    if truth.shape != result.shape:
        raise ValueError(
            f"score_frames: label maps must have one shape, got {truth.shape} and {result.shape};"
            " write every predicted frame at the size of the truth."
        )
    void = truth == VOID
    objects = int(truth[~void].max(initial=0))
    if not objects:
        raise ValueError("score_frames: the truth must show an object, got background only; check the annotations.")
    if int(result.max(initial=0)) > objects:
        raise ValueError(
            f"score_frames: a result may have no more objects than the truth, got {int(result.max())} and {objects};"
            " label the objects as the first frame does."
        )
    scores = np.empty((2, objects, len(truth)))
    for number in range(objects):
        for t in range(len(truth)):
            masks = truth[t] == number + 1, result[t] == number + 1, void[t]
            scores[:, number, t] = region_similarity(*masks), contour_accuracy(*masks)
    return SequenceScores(*scores)


def score_sequence(truth: np.ndarray, result: np.ndarray) -> SequenceScores:
    """The same without the first frame, which was given, and the last one, as the benchmark has it."""
    if len(truth) < 3:
        raise ValueError(f"score_sequence: a sequence needs 3 frames or more, got {len(truth)}; leave it out.")
    return score_frames(truth[1:-1], result[1:-1])


def summarize(sequences: dict[str, SequenceScores]) -> dict[str, float]:
    """Means over all objects of all sequences, each object counted once, and J&F, the benchmark's number."""
    pairs = [pair for scores in sequences.values() for pair in scores.statistics()]
    found = {
        f"{name}_{what}": float(np.mean([getattr(pair[side], what) for pair in pairs]))
        for side, name in enumerate("JF")
        for what in ("mean", "recall", "decay")
    }
    return {"J&F": (found["J_mean"] + found["F_mean"]) / 2} | found
