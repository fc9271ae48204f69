"""An objective of one's own in one file: in a plain loop, and with the trainer. Some seconds on a CPU.

    python examples/new_objective.py [--output FOLDER]
    patchlight train examples/new_objective.py:run --objectives.options.1.width 32

How alike the images of a batch are must be the same for the student's view as for the teacher's other view. docs/new_method.md
explains the interface, docs/own_loop.md the loop.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import patchlight
from patchlight.checks import check_numbers
from patchlight.data.policy import dino_policy
from patchlight.data.procedural import ProceduralSource
from patchlight.objectives import DinoOptions, register
from patchlight.objectives.interface import BuildContext, Needs, Objective, ObjectiveOptions, heads_of
from patchlight.recipes.ours import debug
from patchlight.records import Clock, Cues, Now, Side, Views

NOT_ITSELF = -1e4  # in place of an image's likeness to itself, which says nothing


@register
@dataclass(frozen=True, slots=True)
class LikenessOptions(ObjectiveOptions):
    """Each field is a setting of the command line, with the text below it."""

    width: int = 64
    """Width of the projections that are compared."""
    student_temperature: float = 0.1
    """By which the student's likenesses are divided."""
    teacher_temperature: float = 0.04
    """By which the teacher's likenesses are divided, after the first epoch."""

    def __post_init__(self) -> None:
        check_numbers(self, width="[1, inf)", student_temperature="(0, inf)", teacher_temperature="(0, inf)")

    def build(self, context: BuildContext) -> Likeness:
        return Likeness(self)


class Likeness(Objective):
    """The term "likeness/images": cross-entropy of two distributions over the other images of the batch."""

    name = "likeness"

    def __init__(self, options: LikenessOptions) -> None:
        super().__init__()
        self.options = options

    def needs(self) -> Needs:
        return Needs(global_crops=2)

    def head(self, width: int) -> nn.Module:
        """In both branches; the teacher's follows the student's."""
        return nn.Sequential(nn.Linear(width, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, self.options.width))

    def schedule(self, clock: Clock) -> dict[str, float]:
        """What changes from step to step; `forward` reads it on the device."""
        return {"likeness/temperature": self.options.teacher_temperature if clock.epoch else 0.07}

    def forward(self, student: Side, teacher: Side, views: Views, cues: Cues, now: Now) -> dict[str, Tensor]:
        head, teacher_head = heads_of(self.name, student, teacher)
        mine = F.normalize(head(student.global_crops.summary).float(), dim=-1)  # [V, B, width]
        with torch.no_grad():
            other = F.normalize(teacher_head(teacher.global_crops.summary).float(), dim=-1).roll(1, dims=0)
            target = self.likenesses(other, other, now["likeness/temperature"]).softmax(dim=-1)
        log_share = self.likenesses(mine, other, self.options.student_temperature).log_softmax(dim=-1)
        return {"likeness/images": -(target * log_share).sum(dim=-1).mean()}

    def likenesses(self, x: Tensor, y: Tensor, temperature: Tensor | float) -> Tensor:
        """[V, B, B] cosines of each image with the others."""
        with torch.autocast(x.device.type, enabled=False):
            cosines = x @ y.mT / temperature
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return cosines.masked_fill(itself, NOT_ITSELF).float()


SMALL = DinoOptions(prototypes=256, hidden=256, bottleneck=64, hidden_norm="batch", target="sinkhorn")


def run() -> patchlight.Run:
    """Twenty small steps of DINO and the likeness of images, with the trainer."""
    small = debug()
    objectives = patchlight.Objectives((SMALL, LikenessOptions()), weights={"likeness/images": 0.5})
    data = replace(small.data, batch_per_rank=8, procedural_images=160)
    output = replace(small.output, folder="runs/new_objective")
    return replace(small, objectives=objectives, data=data, output=output, model=replace(small.model, summary="cls"))


def main(output: Path) -> None:
    """The same without the trainer."""
    torch.manual_seed(0)
    crops = dino_policy(local_count=2, global_size=48, local_size=32, global_scale=(0.6, 1.0), local_scale=(0.3, 0.6))
    images = ProceduralSource(count=128, size=64).images
    loader = DataLoader(images, 16, shuffle=True, drop_last=True, collate_fn=patchlight.MultiCrop(crops))
    backbone = patchlight.build_backbone("vit_tiny", patch_size=8, image_size=48, width=96, depth=3, heads=3)
    length = {"steps": 2 * len(loader), "steps_per_epoch": len(loader)}
    options, weights = [SMALL, LikenessOptions()], {"likeness/images": 0.5}
    pretraining = patchlight.Pretraining(backbone, options, crops, weights=weights, **length)
    optimizer = torch.optim.AdamW(pretraining.student.parameters(), lr=1e-3)
    for _ in range(2):
        for views in loader:
            loss, terms = pretraining(views)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pretraining.after_step(momentum=0.98)
        print(f"step {pretraining.clock.step}:", ", ".join(f"{name} {term:.3f}" for name, term in terms.items()))
    output.mkdir(parents=True, exist_ok=True)
    torch.save(pretraining.state_dict(), output / "training.pt")
    print(f"The state, from which load_state_dict continues: {output / 'training.pt'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/new_objective"))
    main(parser.parse_args().output)
