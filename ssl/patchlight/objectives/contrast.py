"""What the contrastive methods share: rows of all ranks, and the cross-entropy of each query against its own key."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..checks import check, check_numbers
from ..records import Side
from .interface import heads_of, predictor_of
from .targets import distributed


def check_contrast_options(options: Any) -> None:
    """Checks the options that contrastive methods share, by their names."""
    sizes = ("queue", "hidden", "out", "layers", "predictor_layers")
    check_numbers(options, temperature="(0, inf)", **dict.fromkeys(sizes, "[1, inf)"))


def unit_rows(x: Tensor) -> Tensor:
    """l2-normalized, in fp32 or better: a bf16 cosine is wrong by 0.002, which is 1 % after / 0.2."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12)


@torch.no_grad()
def gather_rows(x_VBD: Tensor) -> tuple[Tensor, int]:
    """[V, B * world, D] the rows of all ranks, rank by rank, without gradient; and the index of this rank's first."""
    if not distributed():
        return x_VBD.detach(), 0
    parts = [torch.empty_like(x_VBD, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x_VBD.detach().contiguous())
    return torch.cat(parts, dim=1), x_VBD.shape[1] * dist.get_rank()


def queries_and_keys(name: str, student: Side, teacher: Side) -> tuple[Tensor, Tensor]:
    """[V, B, D] each, normalized: the student's prediction for each view, and the teacher's projection of it."""
    head, teacher_head = heads_of(name, student, teacher)
    predictor = predictor_of(name, student)
    with torch.no_grad():
        keys = unit_rows(teacher_head(teacher.global_crops.summary))
    return unit_rows(predictor(head(student.global_crops.summary))), keys


def ordered_pairs(views: int) -> list[tuple[int, int]]:
    """All pairs of a query's view and a key's view that differ."""
    check(views > 1, "A view needs another view to be compared with", "one crop per image", "use two global crops")
    return list(permutations(range(views), 2))


def cross_entropy(logits: Tensor, place: Tensor) -> Tensor:
    """The mean cross-entropy of logits [R, keys] against the place [R] of each row's own key, not under autocast."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits, place)
