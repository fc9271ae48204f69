"""Label propagation: a frame's labels from those of earlier frames, by the similarity of patches. Nothing is trained.

Patches are compared in tiles: a tile of the frame with the window of each context frame that its patches may be compared
with. The matrix of all scores is never made; only patches that reach the k-th best similarity vote.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check, check_numbers

TILE, GROUP = 12, 16  # patches along a tile's side; columns of scores that share a maximum


@dataclass(frozen=True)
class PropagationProtocol:
    """DINO's protocol for DAVIS 2017."""

    context_frames: int = 7
    """The latest frames whose labels are read, in addition to the first one."""
    neighbors: int = 5
    """How many of the most similar patches of all context frames together vote for a patch; ties all vote."""
    radius: int | None = 12
    """Largest distance in rows and in columns of patches that are compared; None: any distance."""
    temperature: float = 0.1
    """Votes weigh exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        check_numbers(self, context_frames="[1, inf)", neighbors="[1, inf)", radius="[0, inf)", temperature="(0, inf)")


@torch.no_grad()
def propagate(
    features: Iterable[Tensor], first: Tensor, protocol: PropagationProtocol = PropagationProtocol()
) -> Iterator[Tensor]:
    """Soft labels [h, w, C] of the second frame, the third, and so on.

    features: of each frame [h, w, D], of any scale; first: labels of the first frame [h, w, C], usually one-hot. Soft
    labels are what the next frames read. Memory: context_frames + 2 frames of features and labels, and a tile's scores.
    """
    frames = iter(features)
    start = F.normalize(next(frames).float(), dim=-1), first.float()
    check(
        start[0].shape[:2] == first.shape[:2],
        "propagate: features and labels must be on one grid",
        f"{tuple(start[0].shape[:2])} and {tuple(first.shape[:2])}",
        "resize the first mask to the grid of patches",
    )
    latest: deque[tuple[Tensor, Tensor]] = deque(maxlen=protocol.context_frames)
    for frame in frames:
        frame = F.normalize(frame.float(), dim=-1)
        labels = propagate_frame(frame, [start, *latest], protocol)
        latest.append((frame, labels))
        yield labels


def propagate_frame(target: Tensor, context: list[tuple[Tensor, Tensor]], protocol: PropagationProtocol) -> Tensor:
    """Soft labels [h, w, C] of one frame [h, w, D] from pairs of features [h, w, D] and labels [h, w, C], all normalized."""
    height, width, _ = target.shape
    radius = max(height, width) if protocol.radius is None else protocol.radius
    labels = torch.stack([labels for _, labels in context]).flatten(0, 2)  # [T * h * w, C]
    place = torch.arange(len(labels), device=target.device).view(len(context), height, width)
    out = target.new_empty(height, width, labels.shape[1])
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
            votes = _vote(scores.flatten(2).flatten(0, 1), labels, index, protocol)
            out[rows, columns] = votes.view(*tile.shape[:2], -1)
    return out


def _vote(scores: Tensor, labels: Tensor, index: Tensor, protocol: PropagationProtocol) -> Tensor:
    """Labels [p, C] of p patches: the weighted mean of those whose score [p, n] is at least the k-th best."""
    k = min(protocol.neighbors, scores.shape[1])
    row, column = (scores >= kth_largest(scores, k)[:, None]).nonzero().unbind(1)
    weight = ((scores[row, column] - 1) / protocol.temperature).exp()  # a cosine is at most 1; the shift cancels out
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
    candidates = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)
    return candidates.topk(k, dim=1).values[:, -1]


def to_label_map(soft: Tensor, patch_size: int) -> Tensor:
    """Soft labels [h, w, C] to the winning class of every pixel, uint8 [h * patch_size, w * patch_size].

    Enlarged bilinearly; then each class that occurs is stretched from its lowest value (0) to its highest (1).
    """
    maps = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=float(patch_size), mode="bilinear")[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = torch.where(high > 0, (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny), maps)
    return stretched.argmax(0).to(torch.uint8)
