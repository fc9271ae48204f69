"""Training steps with the official mathematics, written from its description, on our own modules' parameters.

Attention maps in memory; iBOT's head and the logits of every row; a log-softmax per pair of crops; SelfPatch's neighbors
gathered and projected again for every position; SERE's relations in memory, sampled twice, also those that are not used;
PQCL's streams through every layer by themselves, one view at a time; clipping that waits for the device at every tensor; a
moving average parameter by parameter. What the releases prepare in their data workers (masks, positions, grids) is given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from patchlight.engine.branches import Branch, Student, Teacher
from patchlight.engine.optim import has_decay
from patchlight.heads.relation import RelationPredictor
from patchlight.heads.summary import ClassAttentionSummary
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.ibot import IbotOptions
from patchlight.objectives.interface import ObjectiveOptions
from patchlight.objectives.pqcl import PqclOptions
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.objectives.sere import SereOptions
from patchlight.records import Views
from patchlight.run import Run

from .official_layers import (
    aggregate,
    common_points,
    cross_entropy,
    head_of,
    logits,
    other_views,
    query_positions,
    sample_twice,
    transformer,
    two_streams,
    vit_of,
)

OptionsType = TypeVar("OptionsType", bound=ObjectiveOptions)


@dataclass(frozen=True)
class BranchOutput:
    """What a branch gives for each crop, in their order."""

    cls: Sequence[Tensor]  # [B, K] logits
    patches: Sequence[Tensor] = ()  # [B, N, K] logits
    residual: Sequence[Tensor] = ()  # [B, N, D] before the final norm
    queries: Sequence[Tensor] = ()  # [B, Q, K] logits


class OfficialStep:
    """Holds what a released trainer holds; `step(views)` is one iteration and returns its loss."""

    def __init__(
        self, student: Student, teacher: Teacher, run: Run, lr: float, views: Views, mask: Tensor | None
    ) -> None:
        self.student, self.teacher, self.run, self.mask = student, teacher, run, mask
        self.centers: dict[str, Tensor] = {}
        of_student = dict(student.named_parameters())
        self.pairs = [(parameter, of_student[name]) for name, parameter in teacher.named_parameters()]
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                (decayed if has_decay(name, parameter) else plain).append(parameter)
        decay = run.optim.weight_decay
        groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, foreach=True)
        self.prepare(views)

    def prepare(self, views: Views) -> None:
        """Computes what the release's data workers deliver beside the crops."""

    def options(self, kind: type[OptionsType]) -> OptionsType:
        return next(options for options in self.run.objectives.options if isinstance(options, kind))

    def loss(self, views: Views) -> Tensor:
        return self.loss_between(*self.forward(views))

    def forward(self, views: Views) -> tuple[BranchOutput, BranchOutput]:
        """Outputs of student and teacher."""
        raise NotImplementedError

    def loss_between(self, student: BranchOutput, teacher: BranchOutput) -> Tensor:
        raise NotImplementedError

    def step(self, views: Views) -> float:
        loss = self.loss(views)
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        return loss.item()

    def update(self) -> None:
        """Clipping, AdamW and the moving average."""
        clip, momentum = self.run.optim.clip, self.run.optim.teacher_momentum
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = clip / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:  # a wait for the device, per tensor
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in self.pairs:
                teacher.mul_(momentum).add_((1 - momentum) * student)

    def make_targets(self, name: str, logits: Sequence[Tensor], temperature: float, momentum: float) -> list[Tensor]:
        """The targets from these logits; afterwards the center of this name moves towards the mean of all logits."""
        first = logits[0][..., :1, :]
        center = self.centers.get(name, torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32)))
        targets = [((each - center) / temperature).softmax(-1).detach() for each in logits]
        with torch.no_grad():
            mean = torch.cat([each.flatten(0, -2) for each in logits]).mean(0)
            self.centers[name] = momentum * center + (1 - momentum) * mean
        return targets


class OfficialDino(OfficialStep):
    """DINO: global crops for the teacher, one pass per resolution, the logits of every crop's class token."""

    def forward(self, views: Views) -> tuple[BranchOutput, BranchOutput]:
        with torch.no_grad():
            teacher = self.forward_branch(self.teacher, [*views.global_crops.pixels])
        return self.forward_branch(self.student, crops_of(views)), teacher

    def forward_branch(self, branch: Branch, crops: list[Tensor]) -> BranchOutput:
        vit, head = vit_of(branch), head_of(branch, "dino")
        cls: list[Tensor] = []
        residual: list[Tensor] = []
        for same in by_size(crops):
            x = transformer(vit, torch.cat(same))
            cls.append(vit.norm(x)[:, 0])
            residual += x[:, 1:].chunk(len(same))
        return BranchOutput(logits(head.prototypes, head(torch.cat(cls))).chunk(len(crops)), residual=residual)

    def loss_between(self, student: BranchOutput, teacher: BranchOutput) -> Tensor:
        o = self.options(DinoOptions)
        targets = self.make_targets("cls", teacher.cls, o.teacher_temperature, o.center_momentum)
        return other_views(targets, [output / o.student_temperature for output in student.cls])


class OfficialSelfPatch(OfficialDino):
    """DINO + SelfPatch: all crops for both branches; the teacher aggregates each patch's neighbors."""

    def forward(self, views: Views) -> tuple[BranchOutput, BranchOutput]:
        crops = crops_of(views)
        with torch.no_grad():
            teacher = self.forward_branch(self.teacher, crops, self.options(SelfPatchOptions).neighbors.k)
        return self.forward_branch(self.student, crops), teacher

    def forward_branch(self, branch: Branch, crops: list[Tensor], k: int | None = None) -> BranchOutput:
        """Logits of the summary and of the patches; with k, each patch is replaced by the summary of its k neighbors."""
        vit, summary = vit_of(branch), branch.summary
        assert isinstance(summary, ClassAttentionSummary)
        cls: list[Tensor] = []
        patches: list[Tensor] = []
        for same in by_size(crops):
            pixels = torch.cat(same)
            tokens = aggregate(summary, transformer(vit, pixels), vit.grid(*pixels.shape[-2:]), k)
            dino, selfpatch = head_of(branch, "dino"), head_of(branch, "selfpatch")
            cls += logits(dino.prototypes, dino(tokens[:, 0])).chunk(len(same))
            patches += logits(selfpatch.prototypes, selfpatch(tokens[:, 1:])).chunk(len(same))
        return BranchOutput(cls, patches)

    def loss_between(self, student: BranchOutput, teacher: BranchOutput) -> Tensor:
        o, weight = self.options(SelfPatchOptions), self.run.objectives.weights["selfpatch/patch"]
        targets = self.make_targets("patch", teacher.patches, o.teacher_temperature, o.center_momentum)
        outputs = [output / o.student_temperature for output in student.patches]
        total = sum(cross_entropy(*both).mean() for both in zip(targets, outputs, strict=True))
        return super().loss_between(student, teacher) + weight * total / len(targets)


class OfficialIbot(OfficialStep):
    """iBOT: the head and the logits of all tokens of all crops, the loss of all patches times the mask."""

    def forward(self, views: Views) -> tuple[BranchOutput, BranchOutput]:
        crops = [*views.global_crops.pixels]
        with torch.no_grad():
            teacher = self.forward_branch(self.teacher, crops)
        student = self.forward_branch(self.student, crops, self.mask)
        if views.local_crops is None:
            return student, teacher
        local = self.forward_branch(self.student, [*views.local_crops.pixels])  # its patches' logits are never used
        cls, residual = [*student.cls, *local.cls], [*student.residual, *local.residual]
        return BranchOutput(cls, student.patches, residual), teacher

    def forward_branch(self, branch: Branch, crops: list[Tensor], mask: Tensor | None = None) -> BranchOutput:
        vit, head = vit_of(branch), head_of(branch, "ibot")
        x = transformer(vit, torch.cat(crops), None if mask is None else mask.flatten(0, 1))
        z = head(vit.norm(x))
        cls, patches = logits(head.prototypes, z[:, 0]), logits(head.patch_prototypes, z[:, 1:])
        return BranchOutput(*(parts.chunk(len(crops)) for parts in (cls, patches, x[:, 1:])))

    def loss_between(self, student: BranchOutput, teacher: BranchOutput) -> Tensor:
        assert self.mask is not None
        o = self.options(IbotOptions)
        targets = self.make_targets("cls", teacher.cls, o.warmup_teacher_temperature, o.center_momentum)
        loss = other_views(targets, [output / o.student_temperature for output in student.cls])
        temperature, momentum = o.warmup_patch_teacher_temperature, o.patch_center_momentum
        targets = self.make_targets("patch", teacher.patches, temperature, momentum)
        for target, output, mask in zip(targets, student.patches, self.mask, strict=True):
            of_patch = cross_entropy(target, output / o.student_temperature) * mask
            loss = loss + (of_patch.sum(-1) / mask.sum(-1).clamp(min=1)).mean() / len(targets)
        return loss


class OfficialPqcl(OfficialIbot):
    """iBOT + PQCL: every view and every query crop by itself, patches and queries as two streams."""

    def prepare(self, views: Views) -> None:
        assert views.query_crops is not None
        self.positions = query_positions(views.query_crops, views.global_crops, vit_of(self.student).patch_size)

    def forward(self, views: Views) -> tuple[BranchOutput, BranchOutput]:
        assert views.query_crops is not None and self.mask is not None
        with torch.no_grad():
            crops = [*views.global_crops.pixels, *views.query_crops.pixels]
            outputs = [self.forward_branch(self.teacher, [crop]) for crop in crops]
        number, patches = len(views.global_crops.pixels), [output.patches[0] for output in outputs]
        cls = [output.cls[0] for output in outputs[:number]]
        teacher = BranchOutput(cls, patches[:number], queries=patches[number:])
        inputs = zip(views.global_crops.pixels, self.mask, self.positions, strict=True)
        student_cls, student_patches, queries = zip(*(self.forward_view(*view) for view in inputs), strict=True)
        return BranchOutput(student_cls, student_patches, queries=queries), teacher

    def forward_view(self, pixels: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's logits for one view: of the class token, of the patches, of the queries."""
        vit, head = vit_of(self.student), head_of(self.student, "ibot")
        x, queries = two_streams(vit, pixels, mask, positions)
        z = head(vit.norm(torch.cat([x, queries], dim=1)))
        patches, queries = logits(head.patch_prototypes, z[:, 1:]).split((x.shape[1] - 1, queries.shape[1]), dim=1)
        return logits(head.prototypes, z[:, 0]), patches, queries

    def loss_between(self, student: BranchOutput, teacher: BranchOutput) -> Tensor:
        o = self.options(PqclOptions)
        targets = self.make_targets("query", teacher.queries, o.warmup_teacher_temperature, o.center_momentum)
        target = torch.cat(targets, dim=1)
        total = sum(cross_entropy(target, output / o.student_temperature).mean() for output in student.queries)
        return super().loss_between(student, teacher) + total / len(student.queries)


@dataclass(frozen=True)
class Relations:
    """Relations in V crops of one size."""

    spatial: Tensor  # [V, B, M, N, N]
    channel: Tensor  # [V, B, D, D]


class OfficialSere(OfficialStep):
    """SERE over a host: relations of both networks' projections and predictions, their pairs one by one."""

    def prepare(self, views: Views) -> None:
        o, predictor = self.options(SereOptions), self.student.predictors["sere"]
        assert isinstance(predictor, RelationPredictor) and views.local_crops is not None
        self.predictor = predictor
        self.prediction = copy.deepcopy(predictor.prediction).requires_grad_(False)  # the teacher's, as released
        self.pairs += zip(self.prediction.parameters(), predictor.prediction.parameters(), strict=True)
        boxes = [*views.global_crops.box, *views.local_crops.box]
        flips = [*views.global_crops.flip, *views.local_crops.flip]
        number = len(views.global_crops.box)
        self.grids = {}  # of a teacher's global crop and a student's crop: where each is sampled
        for q in range(number):
            for v in set(range(len(boxes))) - {q}:
                count = o.global_points if v < number else o.local_points
                self.grids[q, v] = [common_points(boxes[q], boxes[v], boxes[at], flips[at], count) for at in (q, v)]

    def loss(self, views: Views) -> Tensor:
        student, teacher = self.forward(views)
        o, predictor = self.options(SereOptions), self.predictor
        assert predictor.local_head is not None
        weights, number = self.run.objectives.weights, len(views.global_crops.pixels)
        with torch.no_grad():
            target, _ = self.relations(self.teacher.heads["sere"], self.prediction, teacher.residual)
        _, global_ = self.relations(self.student.heads["sere"], predictor.prediction, student.residual[:number])
        _, local = self.relations(predictor.local_head, predictor.local_prediction, student.residual[number:])
        spatial, channel = [], []
        for (q, v), (teacher_grid, student_grid) in self.grids.items():
            output, place = (global_, v) if v < number else (local, v - number)
            wanted = sample_twice(target.spatial[q], teacher_grid) / o.teacher_spatial_temperature
            spatial.append(cross_entropy(wanted.softmax(-1), sample_twice(output.spatial[place], student_grid)).mean())
            wanted = target.channel[q] / o.teacher_channel_temperature
            channel.append(cross_entropy(wanted.softmax(-1), output.channel[place]).mean())
        alpha, beta = weights["sere/spatial"], weights["sere/channel"]
        host = self.loss_between(student, teacher) * (4 - alpha - beta) / 2
        return host + alpha * torch.stack(spatial).mean() + beta * torch.stack(channel).mean()

    def relations(self, head: nn.Module, prediction: nn.Module, residual: Sequence[Tensor]) -> list[Relations]:
        """Relations of the projections and of the predictions, always both."""
        projected = head(torch.stack([*residual]))
        found = []
        for features in (projected, prediction(projected)):
            x = features.spatial.unflatten(-1, (vit_of(self.student).heads, -1)).transpose(2, 3)  # [V, B, M, N, d]
            y = features.channel / features.channel.shape[2] ** 0.5
            found.append(Relations(x @ x.mT * x.shape[-1] ** -0.5, y.mT @ y))
        return found


class OfficialIbotSere(OfficialSere, OfficialIbot):
    """iBOT + SERE, as released."""


class OfficialDinoSere(OfficialSere, OfficialDino):
    """DINO + SERE, as the paper has it; it was never released."""


def crops_of(views: Views) -> list[Tensor]:
    """Global crops, then local ones."""
    return [*views.global_crops.pixels, *(() if views.local_crops is None else views.local_crops.pixels)]


def by_size(crops: list[Tensor]) -> list[list[Tensor]]:
    """Consecutive crops of one size together."""
    return [list(same) for _, same in groupby(crops, key=lambda crop: crop.shape[-1])]
