"""Label propagation: a frame's labels from those of earlier frames, by the similarity of patches. Nothing is trained.

Patches are compared in tiles: a tile of the frame against the window of each context frame that its patches may look
into. No matrix of all scores is ever made; only what reaches a patch's k-th best similarity votes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, GROUP = 12, 16  # patches along a tile's side; columns of scores that share a maximum


@dataclass(frozen=True)
class Propagation:
    """DINO's protocol for DAVIS 2017."""

    context_frames: int = 7
    """The latest frames whose labels are read, beside the first one."""
    neighbors: int = 5
    """A patch listens to this many most similar patches over all context frames together; ties stay."""
    radius: int | None = 12
    """Rows and columns that a patch may look away from its own place; None: anywhere."""
    temperature: float = 0.1
    """Votes weigh exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        for name in ("context_frames", "neighbors", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"Propagation.{name} must be positive, got {getattr(self, name)}; the protocol's is usual."
                )


@torch.no_grad()
def propagate(features: Iterable[Tensor], first: Tensor, rule: Propagation = Propagation()) -> Iterator[Tensor]:
    """Soft labels [h, w, C] of the second frame, the third, and so on.

    features: of each frame [h, w, D], of any scale; first: labels of the first frame [h, w, C], usually one-hot. The labels
    that are handed on are the soft ones. Memory: context_frames + 2 frames of features and labels, and a tile's scores.
    """
    frames = iter(features)
    known = F.normalize(next(frames).float(), dim=-1)
    if known.shape[:2] != first.shape[:2]:
        raise ValueError(
            f"propagate: features and labels must be on one grid, got {tuple(known.shape[:2])} and"
            f" {tuple(first.shape[:2])}; resize the first mask to the grid of patches."
        )
    start, latest = (known, first.float()), deque(maxlen=rule.context_frames)
    for frame in frames:
        frame = F.normalize(frame.float(), dim=-1)
        labels = propagate_frame(frame, [start, *latest], rule)
        latest.append((frame, labels))
        yield labels


def propagate_frame(target: Tensor, context: list[tuple[Tensor, Tensor]], rule: Propagation) -> Tensor:
    """Soft labels [h, w, C] of one frame [h, w, D] from pairs of features [h, w, D] and labels [h, w, C], all normalized."""
    height, width, _ = target.shape
    radius = max(height, width) if rule.radius is None else rule.radius
    known = torch.stack([labels for _, labels in context]).flatten(0, 2)  # [T * h * w, C]
    place = torch.arange(len(known), device=target.device).view(len(context), height, width)
    out = target.new_empty(height, width, known.shape[1])
    y_all, x_all = (torch.arange(size, device=target.device) for size in (height, width))
    for top in range(0, height, TILE):
        rows, near_rows = slice(top, top + TILE), slice(max(0, top - radius), top + TILE + radius)
        far_y = (y_all[rows, None] - y_all[None, near_rows]).abs() > radius
        for left in range(0, width, TILE):
            columns, near = slice(left, left + TILE), slice(max(0, left - radius), left + TILE + radius)
            far_x = (x_all[columns, None] - x_all[None, near]).abs() > radius
            tile = target[rows, columns]
            window = torch.cat([features[near_rows, near].flatten(0, 1) for features, _ in context])
            scores = (tile.flatten(0, 1) @ window.T).view(*tile.shape[:2], len(context), far_y.shape[1], far_x.shape[1])
            if far_y.any() or far_x.any():
                scores.masked_fill_(far_y[:, None, None, :, None] | far_x[None, :, None, None, :], -torch.inf)
            index = place[:, near_rows, near].flatten()
            out[rows, columns] = _vote(scores.flatten(2).flatten(0, 1), known, index, rule).view(*tile.shape[:2], -1)
    return out


def _vote(scores: Tensor, labels: Tensor, index: Tensor, rule: Propagation) -> Tensor:
    """Labels [p, C] of p patches: the mean of those whose score [p, n] is at least the k-th best, weighted."""
    k = min(rule.neighbors, scores.shape[1])
    row, column = (scores >= kth_largest(scores, k)[:, None]).nonzero().unbind(1)
    weight = ((scores[row, column] - 1) / rule.temperature).exp()  # a cosine is at most 1; the shift cancels out
    total = weight.new_zeros(len(scores)).index_add_(0, row, weight)
    votes = labels[index[column]] * (weight / total[row])[:, None]
    return votes.new_zeros(len(scores), labels.shape[1]).index_add_(0, row, votes)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest of each row of [p, n], found among the k groups of columns with the largest maxima."""
    count = scores.shape[1]
    if count < 4 * GROUP * k:
        return scores.topk(k, dim=1).values[:, -1]
    if pad := -count % GROUP:
        scores = F.pad(scores, (0, pad), value=-torch.inf)
    groups = scores.view(len(scores), GROUP, -1)
    best = groups.amax(1).topk(k, dim=1, sorted=False).indices
    found = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)
    return found.topk(k, dim=1).values[:, -1]


def to_label_map(soft: Tensor, patch_size: int) -> Tensor:
    """Soft labels [h, w, C] to the winning class of every pixel, uint8 [h * patch_size, w * patch_size].

    Enlarged bilinearly; then each class is stretched from its lowest value (0) to its highest (1), if it is anywhere.
    """
    maps = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=float(patch_size), mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = torch.where(high > 0, (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny), maps)
    return stretched.argmax(0).to(torch.uint8)
