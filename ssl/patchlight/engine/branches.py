"""The two branches: a student that gradients update, and a teacher that is its moving average. `assembly` builds them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..backbones.interface import Backbone
from ..checks import check
from ..heads.summary import build_summary
from ..objectives.interface import Objective
from ..records import Crops, Cues, Features, Side, Tokens, Views, Wanted
from .dtensor import local

# FSDP2 finds tensors in what a module returns; torch 2.11 does so in registered classes only.
torch.export.register_dataclass(Features)


class BranchFeatures(NamedTuple):
    """The output of a branch for a batch."""

    global_crops: Features
    local_crops: Features | None = None
    query_crops: Features | None = None


class Branch(nn.Module):
    """A backbone, a summary head, and the heads of the objectives by their names.

    names: of the objectives. hosts: for an objective without a head, the name of the objective whose head it uses.
    separate_views: the backbone gets each view as a separate batch, because of its BatchNorm.
    """

    backbone: Backbone
    summary: Any

    def __init__(
        self,
        backbone: Backbone,
        summary: nn.Module,
        heads: dict[str, nn.Module],
        predictors: dict[str, nn.Module] | None = None,
        names: Sequence[str] | None = None,
        hosts: dict[str, str] | None = None,
        separate_views: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.summary = backbone, summary
        self.heads = nn.ModuleDict(heads)
        self.predictors = nn.ModuleDict(predictors or {})
        self.names = tuple(heads if names is None else names)
        self.hosts = dict(hosts or {})
        self.separate_views = separate_views
        self.sizes_together = False  # whether crops of all sizes go through the backbone together, if it can

    def forward(self, views: Views, cues: Cues | None = None, wanted: Wanted = Wanted()) -> BranchFeatures:  # noqa: B008 frozen
        """Features of the global crops (with cues for them), and of the other crops that are wanted and present."""
        cues = cues or Cues()
        local = views.local_crops if wanted.local_crops else None
        query = views.query_crops if wanted.query_crops else None
        tokens = self._tokens([views.global_crops, local, query], cues, wanted)
        return BranchFeatures(
            self._features(views.global_crops, tokens[0], wanted),
            None if local is None else self._features(local, tokens[1], wanted),
            None if query is None else self._features(query, tokens[2], Wanted()),
        )

    def _tokens(self, crops: Sequence[Crops | None], cues: Cues, wanted: Wanted) -> list[Any]:
        """The backbone's output for each kind of crops, the first with cues; None where there are none."""
        present = [c for c in crops if c is not None]
        if self.sizes_together and self.backbone.takes_sizes and len(present) > 1 and cues.queries is None:
            masks = [cues.mask, *[None] * (len(present) - 1)]
            pairs = [
                (c.pixels.flatten(0, 1), None if mask is None else mask.flatten(0, 1))
                for c, mask in zip(present, masks, strict=True)
            ]
            forward_sizes: Any = self.backbone.forward_sizes
            found = iter(forward_sizes(pairs, wanted.residual and self.backbone.has_final_norm))
        else:
            found = iter([self._tokens_of(c, Cues() if number else cues, wanted) for number, c in enumerate(present)])
        return [None if c is None else next(found) for c in crops]

    def _features(self, crops: Crops, tokens: Tokens, wanted: Wanted) -> Features:
        """The summary's output for crops of a size, by view."""
        result = self.summary(tokens, wanted.neighbors)
        queries = None if tokens.queries is None else self.summary.norm(tokens.queries)
        residual = None
        if wanted.residual:
            residual = tokens.residual if self.backbone.has_final_norm else tokens.patches
        views_and_images = crops.pixels.shape[:2]
        given = (result.summary, result.patches, result.aggregated, queries, residual)
        split: list[Any] = [None if x is None else x.unflatten(0, views_and_images) for x in given]
        return Features(split[0], split[1], tokens.grid, split[2], queries=split[3], residual=split[4])

    def _tokens_of(self, crops: Crops, cues: Cues, wanted: Wanted) -> Tokens:
        """One pass over all crops of a size, V x B images at once, or a pass per view where BatchNorm needs that.

        Not every backbone has the arguments queries and residual: passed only if needed.
        """
        if self.separate_views:
            by_view = [self.backbone(pixels) for pixels in crops.pixels]  # a backbone with BatchNorm takes no cues
            return replace(by_view[0], patches=torch.cat([view.patches for view in by_view]))
        mask = None if cues.mask is None else cues.mask.flatten(0, 1)
        extra: dict[str, Any] = {}
        if cues.queries is not None:
            extra["queries"] = replace(cues.queries, positions=cues.queries.positions.flatten(0, 1))
        if wanted.residual and self.backbone.has_final_norm:
            extra["residual"] = True
        return self.backbone(crops.pixels.flatten(0, 1), mask, **extra)

    def head_of(self, name: str) -> nn.Module | None:
        """The head that an objective uses: its own, or its host's."""
        return dict(self.heads).get(self.hosts.get(name, name))

    def sides(self, features: BranchFeatures) -> dict[str, Side]:
        """What each objective gets from the branch, by the objective's name."""
        predictors = dict(self.predictors)
        return {name: Side(*features, self.head_of(name), predictors.get(name)) for name in self.names}


class Student(Branch):
    """The branch that gradients update."""


class Teacher(Branch):
    """The moving average of the student. It has no gradients, and stays in training mode, as released."""

    def start_from(self, student: Student) -> None:
        """Copies the student, except its predictors."""
        state = student.state_dict()
        self.load_state_dict({name: state[name] for name in self.state_dict() if name in state})
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: Tensor | float, refused: Tensor | None = None) -> None:
        """Moves each parameter by 1 - momentum towards the student's, unless refused is 1; buffers stay as they are.

        AdamW does this in its own sweep. momentum is a float64 tensor on the device where a step must not depend on Python.
        """
        by_name = dict(student.named_parameters())
        named = dict(self.named_parameters())
        own, target = [local(parameter) for parameter in named.values()], [local(by_name[name]) for name in named]
        share = (1 - torch.as_tensor(momentum, dtype=torch.float64, device=own[0].device)).to(own[0].dtype)
        share = share if refused is None else share * (1 - refused)
        if share.device.type == "cpu":
            for parameter, student_parameter in zip(own, target, strict=True):
                parameter.lerp_(student_parameter, share)
            return
        gap = torch._foreach_sub(target, own)
        torch._foreach_mul_(gap, share)
        torch._foreach_add_(own, gap)


def branch_arguments(backbone: Backbone, summary: str, objectives: Sequence[Objective]) -> dict[str, Any]:
    """The arguments of a Branch on this backbone, with new heads."""
    heads = {o.name: head for o in objectives if (head := o.head(backbone.width)) is not None}
    predictors = {o.name: predictor for o in objectives if (predictor := o.predictor(backbone.width)) is not None}
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in backbone.modules())
    return {
        "backbone": backbone,
        "summary": build_summary(summary, backbone),
        "heads": heads,
        "predictors": predictors,
        "names": [o.name for o in objectives],
        "hosts": {o.name: host for o in objectives if (host := o.needs().host) and o.name not in heads},
        "separate_views": has_batch_norm and any(o.needs().separate_views for o in objectives),
    }


def build_branches_on(backbone: Backbone, summary: str, objectives: Sequence[Objective]) -> tuple[Student, Teacher]:
    """Both branches with a head per objective: the student on this backbone, the teacher on a copy that drops nothing."""
    arguments = branch_arguments(backbone, summary, objectives)
    copies = copy.deepcopy(arguments | {"predictors": {}})
    student, teacher = Student(**arguments), Teacher(**copies | {"backbone": without_drops(copies["backbone"])})
    teacher.start_from(student)
    return student, teacher


def without_drops(backbone: Backbone) -> Backbone:
    """The backbone itself, from now on without stochastic depth and dropout."""
    for module in backbone.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, child in module.named_children():
            if type(child).__name__ in ("DropPath", "StochasticDepth"):  # ours, timm's and torchvision's
                setattr(module, name, nn.Identity())
    return backbone


def check_teacher_student(teacher: Teacher, student: Student) -> None:
    """The teacher must be a second network of the same shape that no gradient reaches."""
    expected = {name for name, _ in student.named_parameters() if not name.startswith("predictors.")}
    names = {name for name, _ in teacher.named_parameters()}
    check(
        names == expected,
        "The teacher must have the student's parameters",
        f"{sorted(names ^ expected)[:4]} in only one of them",
        "build both with the same heads",
    )
    memory = {local(p).untyped_storage().data_ptr() for p in student.parameters() if local(p).numel()}
    shared = [n for n, p in teacher.named_parameters() if local(p).untyped_storage().data_ptr() in memory]
    check(
        not shared,
        "teacher aliases student: the teacher must own its memory",
        f"{len(shared)} shared parameters such as {', '.join(shared[:1])}",
        "build a second network and copy the values",
    )
    learning = [name for name, p in teacher.named_parameters() if p.requires_grad]
    check(
        not learning,
        "The teacher must not collect gradients",
        f"{', '.join(learning[:1])} that does",
        "call start_from first",
    )
