"""Pretraining in a training loop of one's own: a module that has both branches and the objectives, and no loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .backbones.wrapped import wrap_backbone
from .checks import check, check_choice, check_number
from .data.masking import FixedMasks
from .data.policy import CropPolicy, dino_policy
from .engine.batch_loss import batch_loss
from .engine.branches import build_branches_on, check_teacher_student
from .needs import Given, check_batch, check_global_batch, check_objectives
from .objectives.interface import BuildContext, Masks, ObjectiveOptions
from .objectives.targets import distributed
from .objectives.weighted import WeightedObjectives
from .records import Clock, Views, now_at
from .run import Objectives


class Pretraining(nn.Module):
    """Student, teacher and objectives, for a loop of one's own:

        pretraining = Pretraining(backbone, [DinoOptions()], crops, steps=epochs * len(loader), steps_per_epoch=len(loader))
        optimizer = torch.optim.AdamW(pretraining.student.parameters())
        for views in loader:
            loss, terms = pretraining(views)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pretraining.after_step(momentum=0.996)

    It computes what a `Run` does, and works under torch.autocast, in DistributedDataParallel and with accumulated gradients.
    The rates are the loop's. Kept are `teacher.backbone` and `student.backbone`.

    Attributes:
        student, teacher: the branches, each with `backbone`, `summary` and `heads`.
        objectives: the losses with their centers and queues.
        clock: how far the training is; temperatures and masks follow it, and state_dict() has it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        objectives: Sequence[ObjectiveOptions],
        crops: CropPolicy | None = None,
        *,
        steps: int,
        steps_per_epoch: int,
        summary: str = "cls",
        weights: Mapping[str, float] | None = None,
        masks: Masks | None = None,
    ) -> None:
        """
        Args:
            backbone: `build_backbone(...)`, a timm model, or any module that `wrap_backbone` takes. It becomes the student's;
                the teacher gets a copy that drops nothing.
            objectives: the options of each objective, such as `[DinoOptions(), SelfPatchOptions()]`.
            crops: the policy of the crops that the loop passes, as for `MultiCrop`; by default `dino_policy()`.
            steps: optimizer steps of the whole training.
            steps_per_epoch: optimizer steps that count as an epoch, in which the options' warm-ups are given.
            summary: the vector of an image: the class token (cls), class attention over the patches (class_attention), or
                their mean.
            weights: of the loss terms by name, such as `{"selfpatch/patch": 0.1}`; 1 for the others.
            masks: which patches are hidden, where an objective needs it; by default `FixedMasks()`.
        """
        super().__init__()
        check_number("Pretraining: steps", steps, "[1, inf)", "pass epochs x len(loader)", whole=True)
        check_number("Pretraining: steps_per_epoch", steps_per_epoch, "[1, inf)", "pass len(loader)", whole=True)
        check_choice("Pretraining: summary", summary, ("cls", "class_attention", "mean"))
        chosen = Objectives(tuple(objectives), dict(weights or {}))  # its checks are those of a run
        self.crops = crops or dino_policy()
        backbone = wrap_backbone(backbone, self.crops.global_crops[0].size)
        for _, specs in self.crops.kinds():
            backbone.grid(specs[0].size, specs[0].size)
        context = BuildContext(chosen.options, masks or FixedMasks(), backbone.heads, bool(self.crops.local_crops))
        self.objectives = WeightedObjectives([o.build(context) for o in chosen.options], chosen.weights)
        parts = self.objectives.objectives()
        check_objectives(Given.of_backbone(backbone, summary, self.crops), parts)
        self.student, self.teacher = build_branches_on(backbone, summary, parts)
        check_teacher_student(self.teacher, self.student)
        self.clock = Clock(0, steps, 0, steps_per_epoch)
        self._images = 0  # of this step until now, on this rank
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, self._not_of_ddp())

    def _not_of_ddp(self) -> list[str]:
        """What DistributedDataParallel must leave alone: the sums of a step, which are each rank's own, where it would copy the
        first rank's; and a mask token that nothing uses, for whose gradient it would wait."""
        masked = any(o.needs().masks or o.needs().queries for o in self.objectives.objectives())
        return [*self._sums(), *([] if masked else ["student.backbone.mask_token"])]

    def forward(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, whose gradients are the student's; and numbers for a log, without gradients: the unweighted
        terms by name, "loss", and "teacher/spread", by which the teacher's summaries differ: 1 for independent directions, 0
        where they have collapsed to one."""
        rule, remedy = "Pretraining must be called in training mode", "evaluate pretraining.teacher.backbone"
        check(self.training, rule, "evaluation mode, in which centers and queues would move too", remedy)
        self._check_views(views)
        images, world, rank = len(views.ids), *_processes()
        for objective in self.objectives.objectives():
            check_batch(objective.name, objective.needs(), images, "pass larger batches")
            check_global_batch(objective.name, objective.needs(), images * world)
        clock = replace(self.clock, first_image=self.clock.images_seen + self._images * world + rank * images)
        now = now_at(clock, self.objectives.schedule(clock), views.ids.device)
        loss, terms = batch_loss(self.student, self.teacher, self.objectives, views, now)
        self._images += images
        return loss, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def after_step(self, momentum: float | Tensor) -> None:
        """What follows each step of the optimizer, once, however many batches were accumulated: the teacher keeps the share
        `momentum` of its weights, centers and queues move, and the clock counts the step."""
        rule, remedy = "after_step must follow a forward", "call it once per step of the optimizer"
        check(self._images > 0, rule, "none since the last step", remedy)
        if not isinstance(momentum, Tensor):
            check_number("after_step: momentum", momentum, "[0, 1]", "0.996 is usual")
        images = self._images * _processes()[0]
        for objective in self.objectives.objectives():
            check_global_batch(objective.name, objective.needs(), images)
        self.teacher.follow(self.student, momentum)
        self.objectives.after_step()
        self.clock, self._images = self.clock.next(images), 0

    @torch.no_grad()
    def skip_step(self) -> None:
        """In place of `after_step`, where the optimizer's step was left out, as one that is not finite: teacher, centers,
        queues and clock stay, and the step's batches are forgotten. Only statistics of BatchNorm have seen them."""
        for buffer in self._sums().values():
            buffer.zero_()
        self._images = 0

    def _sums(self) -> dict[str, Tensor]:
        """The buffers of the objectives that hold sums of the batches of a step, by name: they are in no checkpoint."""
        kept = self.objectives.state_dict()
        return {f"objectives.{name}": buffer for name, buffer in self.objectives.named_buffers() if name not in kept}

    def _check_views(self, views: Views) -> None:
        """Views must have the crops of the policy, by which the objectives were built."""
        check(
            isinstance(views, Views), "Pretraining takes Views", f"a {type(views).__name__}", "make them with MultiCrop"
        )
        expected = {kind: (sum(spec.count for spec in specs), specs[0].size) for kind, specs in self.crops.kinds()}
        kinds = ("global_crops", "local_crops", "query_crops")
        got = {kind: tuple(c.pixels.shape[::4]) for kind in kinds if (c := getattr(views, kind)) is not None}
        rule, remedy = f"Views must have the crops of the policy, {expected}", "pass the policy of MultiCrop as crops"
        check(got == expected, f"{rule} (number, size)", got, remedy)

    def get_extra_state(self) -> dict[str, int]:
        """The clock, in state_dict()."""
        return self.clock.state()

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continues where the clock was; the length of the training is this one's."""
        self.clock = replace(self.clock, step=state["step"], images_seen=state["images_seen"])
        self._images = 0


def _processes() -> tuple[int, int]:
    """How many processes train together, and the number of this one."""
    return (dist.get_world_size(), dist.get_rank()) if distributed() else (1, 0)
