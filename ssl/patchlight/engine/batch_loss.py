"""From a batch to its loss: both branches, the cues and the objectives, in the one order that every training has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.weighted import WeightedObjectives
from ..records import Features, Now, Views
from ..report.step_profile import part
from .branches import Student, Teacher


def batch_loss(
    student: Student, teacher: Teacher, objectives: WeightedObjectives, views: Views, now: Now
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch; its unweighted terms, and "loss" and "teacher/spread" for the log.

    A CUDA graph may record it: no number comes from the host.
    """
    with part("teacher"), torch.no_grad():
        teacher_features = teacher(views, wanted=objectives.teacher_wants)
    cues = objectives.cue(views, teacher_features.global_crops.grid, now)
    with part("student"):
        student_features = student(views, cues, objectives.student_wants)
    with part("losses"):  # with the heads
        loss, terms = objectives(student.sides(student_features), teacher.sides(teacher_features), views, cues, now)
    return loss, terms | {"loss": loss, "teacher/spread": spread(teacher_features.global_crops)}


def spread(features: Features) -> Tensor:
    """How much the teacher's summaries differ between the images of this rank: 1 for random directions, 0 if constant."""
    rows = torch.nn.functional.normalize(features.summary.flatten(0, 1).float(), dim=-1)
    return (rows - rows.mean(dim=0)).square().sum(dim=-1).mean().sqrt()
