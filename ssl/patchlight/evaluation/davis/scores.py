"""The DAVIS 2017 scores: region similarity J, contour accuracy F, and their mean, recall and decay per object."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ...checks import check, check_least

VOID = 255  # the label of pixels that are not scored
_TOLERANCE = 0.008  # of the image's diagonal: the largest distance between contours that match
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
    truth, result = _without_void(truth, result, void)
    union = np.count_nonzero(truth | result)
    return np.count_nonzero(truth & result) / union if union else 1.0


def contour_accuracy(truth: np.ndarray, result: np.ndarray, void: np.ndarray | None = None) -> float:
    """F: harmonic mean of the share of each contour that lies near the other; 1 without any contour, 0 with only one."""
    truth, result = _without_void(truth, result, void)
    truth_edge, result_edge = contour(truth), contour(result)
    truth_count, result_count = np.count_nonzero(truth_edge), np.count_nonzero(result_edge)
    if not truth_count or not result_count:
        return float(truth_count == result_count)
    radius = int(np.ceil(_TOLERANCE * np.hypot(*truth.shape)))
    rows, columns = (np.flatnonzero((truth_edge | result_edge).any(axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # pixels outside change nothing
    truth_edge, result_edge = truth_edge[box], result_edge[box]
    precision = np.count_nonzero(result_edge & dilated(truth_edge, radius)) / result_count
    recall = np.count_nonzero(truth_edge & dilated(result_edge, radius)) / truth_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _without_void(truth: np.ndarray, result: np.ndarray, void: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    truth, result = truth.astype(bool), result.astype(bool)
    return (truth, result) if void is None else (truth & ~void, result & ~void)


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower, or lower right neighbor; the border itself is no contour."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels with a pixel of the mask inside a disk of this radius around them, [H, W] bool."""
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
    """Scores of label maps [T, H, W], 0 the background. Objects that are missing in the result count as empty masks."""
    check(
        truth.shape == result.shape,
        "score_frames: label maps must have one shape",
        f"{truth.shape} and {result.shape}",
        "write every predicted frame at the size of the truth",
    )
    void = truth == VOID
    objects, predicted = int(truth[~void].max(initial=0)), int(result.max(initial=0))
    check(objects > 0, "score_frames: the truth must show an object", "background only", "check the annotations")
    check(
        predicted <= objects,
        "score_frames: a result may have no more objects than the truth",
        f"{predicted} and {objects}",
        "label the objects as the first frame does",
    )
    scores = np.empty((2, objects, len(truth)))
    for number in range(objects):
        for t in range(len(truth)):
            masks = truth[t] == number + 1, result[t] == number + 1, void[t]
            scores[:, number, t] = region_similarity(*masks), contour_accuracy(*masks)
    return SequenceScores(*scores)


def score_sequence(truth: np.ndarray, result: np.ndarray) -> SequenceScores:
    """The same without the first frame, which is given, and without the last one, as in the benchmark."""
    check_least("score_sequence: the number of frames", len(truth), 3, "leave the sequence out")
    return score_frames(truth[1:-1], result[1:-1])


def summarize(sequences: dict[str, SequenceScores]) -> dict[str, float]:
    """Means over all objects of all sequences, each object counted once, and J&F, the benchmark's number."""
    pairs = [pair for scores in sequences.values() for pair in scores.statistics()]
    means = {
        f"{measure}_{name}": float(np.mean([getattr(pair[side], name) for pair in pairs]))
        for side, measure in enumerate("JF")
        for name in ("mean", "recall", "decay")
    }
    return {"J&F": (means["J_mean"] + means["F_mean"]) / 2} | means
