"""A method outside the package: what docs/new_method.md builds, and test_new_method.py trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchlight.checks import check_numbers
from patchlight.objectives import register
from patchlight.objectives.interface import BuildContext, Needs, Objective, ObjectiveOptions, heads_of
from patchlight.recipes.ours import debug
from patchlight.records import Cues, Now, Side, Views
from patchlight.run import Objectives, Run


@register
@dataclass(frozen=True, slots=True)
class ToyOptions(ObjectiveOptions):
    """out: the width of the projections. momentum: of the mean that is taken off the targets."""

    out: int = 16
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_numbers(self, out="[1, inf)", momentum="[0, 1]")

    def build(self, context: BuildContext) -> Toy:
        return Toy(self)


class Toy(Objective):
    """The term "toy/cosine": 1 - the cosine of the student's projection of a view and the teacher's of the other one."""

    name = "toy"
    mean: Tensor
    total: Tensor

    def __init__(self, options: ToyOptions) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("mean", torch.zeros(options.out))  # in checkpoints
        self.register_buffer("total", torch.zeros(options.out + 1), persistent=False)  # sums and count of a step

    def needs(self) -> Needs:
        return Needs(global_crops=2)

    def head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.options.out)

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        head, teacher_head = heads_of(self.name, student, teacher)
        with torch.no_grad():
            rows = teacher_head(teacher.global_crops.summary).float()  # [V, B, out]
            self.total += torch.cat([rows.sum(dim=(0, 1)), rows.new_full((1,), rows[..., 0].numel())])
        target = (rows - self.mean).roll(1, dims=0)
        prediction = head(student.global_crops.summary).float()
        return {"toy/cosine": 1 - F.cosine_similarity(prediction, target, dim=-1).mean()}

    def after_step(self) -> None:
        self.mean.lerp_(self.total[:-1] / self.total[-1], 1 - self.options.momentum)
        self.total.zero_()


def toy() -> Run:
    """Twenty small steps of the toy method."""
    run = debug()
    return replace(run, objectives=Objectives((ToyOptions(),)), output=replace(run.output, folder="runs/toy"))
