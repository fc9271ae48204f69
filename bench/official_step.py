"""Training steps with the official mathematics, written from its description, on our own modules' parameters.

Attention maps in memory; iBOT's head and the logits of every row; a log-softmax per pair of crops; SelfPatch's neighbors
gathered and projected again for every position; SERE's relations in memory, sampled twice, those that nobody uses made
too; PQCL's streams through every layer by themselves, one view at a time; per-tensor clipping that asks the device, an
EMA parameter by parameter. What the releases prepare in their data workers (masks, positions, grids) is given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from patchlight.engine.branches import Student, Teacher
from patchlight.engine.optim import has_decay
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.ibot import IbotOptions
from patchlight.objectives.pqcl import PqclOptions
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.objectives.sere import SereOptions
from patchlight.records import Views
from patchlight.run import Run

from .official_layers import (
    aggregate,
    common_points,
    cross_entropy,
    logits,
    other_views,
    query_positions,
    sample_twice,
    transformer,
    two_streams,
)


@dataclass(frozen=True)
class Seen:
    """What a branch says of crops, in their order."""

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
        self.options = {type(options): options for options in run.objectives.options}
        self.centers: dict[str, Tensor] = {}
        followed = dict(student.named_parameters())
        self.pairs = [(parameter, followed[name]) for name, parameter in teacher.named_parameters()]
        decayed, plain = [], []
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                (decayed if has_decay(name, parameter) else plain).append(parameter)
        decay = run.optim.weight_decay
        groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, foreach=True)
        self.prepare(views)

    def prepare(self, views: Views) -> None:
        """What the release's data workers hand over beside the crops."""

    def loss(self, views: Views) -> Tensor:
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
            for mine, theirs in self.pairs:
                mine.mul_(momentum).add_((1 - momentum) * theirs)

    def teach(self, name: str, logits: Sequence[Tensor], temperature: float, momentum: float) -> list[Tensor]:
        """The targets of these logits; afterwards the center of this name moves towards the mean of them all."""
        center = self.centers.get(name, torch.zeros_like(logits[0][..., :1, :]))
        targets = [((each - center) / temperature).softmax(-1).detach() for each in logits]
        with torch.no_grad():
            mean = torch.cat([each.flatten(0, -2) for each in logits]).mean(0)
            self.centers[name] = momentum * center + (1 - momentum) * mean
        return targets


class OfficialDino(OfficialStep):
    """DINO: the teacher sees the global crops, one pass per resolution, the logits of every crop's class token."""

    def loss(self, views: Views) -> Tensor:
        return self.compare(*self.see(views))

    def see(self, views: Views) -> tuple[Seen, Seen]:
        """Student and teacher."""
        with torch.no_grad():
            teacher = self.look(self.teacher, [*views.global_crops.pixels])
        return self.look(self.student, crops_of(views)), teacher

    def look(self, branch: nn.Module, crops: list[Tensor]) -> Seen:
        cls, residual = [], []
        for same in by_size(crops):
            x = transformer(branch.backbone, torch.cat(same))
            cls.append(branch.backbone.norm(x)[:, 0])
            residual += x[:, 1:].chunk(len(same))
        head = branch.heads["dino"]
        return Seen(head.prototypes.logits(head(torch.cat(cls))).chunk(len(crops)), residual=residual)

    def compare(self, student: Seen, teacher: Seen) -> Tensor:
        o: DinoOptions = self.options[DinoOptions]
        targets = self.teach("cls", teacher.cls, o.teacher_temperature, o.center_momentum)
        return other_views(targets, [output / o.student_temperature for output in student.cls])


class OfficialSelfPatch(OfficialDino):
    """DINO + SelfPatch: both branches see all crops; the teacher aggregates each patch's neighbors."""

    def see(self, views: Views) -> tuple[Seen, Seen]:
        crops = crops_of(views)
        with torch.no_grad():
            teacher = self.look(self.teacher, crops, self.options[SelfPatchOptions].neighbors.k)
        return self.look(self.student, crops), teacher

    def look(self, branch: nn.Module, crops: list[Tensor], k: int | None = None) -> Seen:
        """Logits of the summary and of the patches; k: of what each patch's k nearest neighbors say."""
        cls, patches = [], []
        for same in by_size(crops):
            pixels = torch.cat(same)
            x, grid = transformer(branch.backbone, pixels), branch.backbone.grid(*pixels.shape[-2:])
            tokens = aggregate(branch.summary, x, grid, k)
            cls += logits(branch.heads["dino"], tokens[:, 0]).chunk(len(same))
            patches += logits(branch.heads["selfpatch"], tokens[:, 1:]).chunk(len(same))
        return Seen(cls, patches)

    def compare(self, student: Seen, teacher: Seen) -> Tensor:
        o: SelfPatchOptions = self.options[SelfPatchOptions]
        targets = self.teach("patch", teacher.patches, o.teacher_temperature, o.center_momentum)
        outputs = [output / o.student_temperature for output in student.patches]
        total = sum(cross_entropy(*both).mean() for both in zip(targets, outputs, strict=True))
        return super().compare(student, teacher) + self.run.objectives.weights["selfpatch/patch"] * total / len(targets)


class OfficialIbot(OfficialStep):
    """iBOT: the head and the logits of all tokens of all crops, the loss of all patches times the mask."""

    def loss(self, views: Views) -> Tensor:
        return self.compare(*self.see(views))

    def see(self, views: Views) -> tuple[Seen, Seen]:
        """Student and teacher."""
        crops = [*views.global_crops.pixels]
        with torch.no_grad():
            teacher = self.look(self.teacher, crops)
        student = self.look(self.student, crops, self.mask)
        if views.local_crops is None:
            return student, teacher
        local = self.look(self.student, [*views.local_crops.pixels])  # the logits of its patches serve nobody
        return Seen(student.cls + local.cls, student.patches, student.residual + local.residual), teacher

    def look(self, branch: nn.Module, crops: list[Tensor], mask: Tensor | None = None) -> Seen:
        x = transformer(branch.backbone, torch.cat(crops), None if mask is None else mask.flatten(0, 1))
        head = branch.heads["ibot"]
        z = head(branch.backbone.norm(x))
        cls, patches = head.prototypes.logits(z[:, 0]), head.patch_prototypes.logits(z[:, 1:])
        return Seen(*(parts.chunk(len(crops)) for parts in (cls, patches, x[:, 1:])))

    def compare(self, student: Seen, teacher: Seen) -> Tensor:
        o: IbotOptions = self.options[IbotOptions]
        targets = self.teach("cls", teacher.cls, o.warmup_teacher_temperature, o.center_momentum)
        loss = other_views(targets, [output / o.student_temperature for output in student.cls])
        targets = self.teach("patch", teacher.patches, o.warmup_patch_teacher_temperature, o.patch_center_momentum)
        for target, output, mask in zip(targets, student.patches, self.mask, strict=True):
            of_patch = cross_entropy(target, output / o.student_temperature) * mask
            loss = loss + (of_patch.sum(-1) / mask.sum(-1).clamp(min=1)).mean() / len(targets)
        return loss


class OfficialPqcl(OfficialIbot):
    """iBOT + PQCL: every view and every query crop by itself, patches and queries as two streams."""

    def prepare(self, views: Views) -> None:
        patch = self.student.backbone.patch_size
        self.positions = query_positions(views.query_crops, views.global_crops, patch)

    def see(self, views: Views) -> tuple[Seen, Seen]:
        with torch.no_grad():
            crops = [*views.global_crops.pixels, *views.query_crops.pixels]
            each = [self.look(self.teacher, [crop]) for crop in crops]
        number = len(views.global_crops.pixels)
        cls, patches = ([getattr(seen, of)[0] for seen in each] for of in ("cls", "patches"))
        teacher = Seen(cls[:number], patches[:number], queries=patches[number:])
        views_ = zip(views.global_crops.pixels, self.mask, self.positions, strict=True)
        cls, patches, queries = zip(*(self.look_and_guess(*view) for view in views_), strict=True)
        return Seen(cls, patches, queries=queries), teacher

    def look_and_guess(self, pixels: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's logits of one view: of the class token, of the patches, of the queries."""
        backbone, head = self.student.backbone, self.student.heads["ibot"]
        x, queries = two_streams(backbone, pixels, mask, positions)
        z = head(backbone.norm(torch.cat([x, queries], dim=1)))
        of_patches = head.patch_prototypes.logits(z[:, 1:])
        return head.prototypes.logits(z[:, 0]), *of_patches.split((x.shape[1] - 1, queries.shape[1]), dim=1)

    def compare(self, student: Seen, teacher: Seen) -> Tensor:
        o: PqclOptions = self.options[PqclOptions]
        targets = self.teach("query", teacher.queries, o.warmup_teacher_temperature, o.center_momentum)
        target = torch.cat(targets, dim=1)
        total = sum(cross_entropy(target, guess / o.student_temperature).mean() for guess in student.queries)
        return super().compare(student, teacher) + total / len(student.queries)


@dataclass(frozen=True)
class Relations:
    """Of V crops of a size."""

    spatial: Tensor  # [V, B, M, N, N]
    channel: Tensor  # [V, B, D, D]


class Sere:
    """SERE over a host: relations of both networks' projections and predictions, their pairs one by one."""

    def prepare(self, views: Views) -> None:
        o: SereOptions = self.options[SereOptions]
        self.predictor = self.student.predictors["sere"]
        self.prediction = copy.deepcopy(self.predictor.prediction).requires_grad_(False)  # the teacher's, as released
        self.pairs += zip(self.prediction.parameters(), self.predictor.prediction.parameters(), strict=True)
        several = (views.global_crops, views.local_crops)
        boxes, flips = [*several[0].box, *several[1].box], [*several[0].flip, *several[1].flip]
        number = len(several[0].box)
        self.grids = {}  # of a teacher's global crop and a student's crop: where each is read
        for q in range(number):
            for v in set(range(len(boxes))) - {q}:
                count = o.global_points if v < number else o.local_points
                self.grids[q, v] = [common_points(boxes[q], boxes[v], boxes[at], flips[at], count) for at in (q, v)]

    def loss(self, views: Views) -> Tensor:
        student, teacher = self.see(views)
        o: SereOptions = self.options[SereOptions]
        weights, number = self.run.objectives.weights, len(views.global_crops.pixels)
        with torch.no_grad():
            taught, _ = self.relate(self.teacher.heads["sere"], self.prediction, teacher.residual)
        _, seen = self.relate(self.student.heads["sere"], self.predictor.prediction, student.residual[:number])
        _, local = self.relate(self.predictor.local_head, self.predictor.local_prediction, student.residual[number:])
        spatial, channel = [], []
        for (q, v), (teacher_grid, student_grid) in self.grids.items():
            side, place = (seen, v) if v < number else (local, v - number)
            wanted = sample_twice(taught.spatial[q], teacher_grid) / o.teacher_spatial_temperature
            spatial.append(cross_entropy(wanted.softmax(-1), sample_twice(side.spatial[place], student_grid)).mean())
            wanted = taught.channel[q] / o.teacher_channel_temperature
            channel.append(cross_entropy(wanted.softmax(-1), side.channel[place]).mean())
        alpha, beta = weights["sere/spatial"], weights["sere/channel"]
        host = self.compare(student, teacher) * (4 - alpha - beta) / 2
        return host + alpha * torch.stack(spatial).mean() + beta * torch.stack(channel).mean()

    def relate(self, head: nn.Module, prediction: nn.Module, residual: Sequence[Tensor]) -> list[Relations]:
        """Relations of the projections and of the predictions, whoever needs them."""
        projected = head(torch.stack(residual))
        found = []
        for features in (projected, prediction(projected)):
            x = features.spatial.unflatten(-1, (self.student.backbone.heads, -1)).transpose(2, 3)  # [V, B, M, N, d]
            y = features.channel / features.channel.shape[2] ** 0.5
            found.append(Relations(x @ x.mT * x.shape[-1] ** -0.5, y.mT @ y))
        return found


class OfficialIbotSere(Sere, OfficialIbot):
    """iBOT + SERE, as released."""


class OfficialDinoSere(Sere, OfficialDino):
    """DINO + SERE, as the paper has it; it was never released."""


def crops_of(views: Views) -> list[Tensor]:
    """Global crops, then local ones."""
    return [*views.global_crops.pixels, *(() if views.local_crops is None else views.local_crops.pixels)]


def by_size(crops: list[Tensor]) -> list[list[Tensor]]:
    """Neighbors of one size together."""
    return [list(same) for _, same in groupby(crops, key=lambda crop: crop.shape[-1])]
