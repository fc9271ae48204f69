"""The two branches: a student that gradients update, and a teacher that is its moving average. `assembly` builds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.interface import Backbone
from ..checks import check
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

    def forward(self, views: Views, cues: Cues | None = None, wanted: Wanted = Wanted()) -> BranchFeatures:  # noqa: B008 frozen
        """Features of the global crops (with cues for them), and of the other crops that are wanted and present."""
        local, query = views.local_crops, views.query_crops
        return BranchFeatures(
            self._features(views.global_crops, wanted, cues),
            self._features(local, wanted) if wanted.local_crops and local is not None else None,
            self._features(query, Wanted()) if wanted.query_crops and query is not None else None,
        )

    def _features(self, crops: Crops, wanted: Wanted, cues: Cues | None = None) -> Features:
        """One pass over all crops of a size, V x B images at once, or a pass per view where BatchNorm needs that."""
        if self.separate_views:
            by_view = [self.backbone(pixels) for pixels in crops.pixels]  # a backbone with BatchNorm takes no cues
            tokens = replace(by_view[0], patches=torch.cat([view.patches for view in by_view]))
        else:
            tokens = self._tokens(crops.pixels.flatten(0, 1), cues or Cues(), wanted)
        result = self.summary(tokens, wanted.neighbors)
        queries = None if tokens.queries is None else self.summary.norm(tokens.queries)
        residual = None
        if wanted.residual:
            residual = tokens.residual if self.backbone.has_class_token else tokens.patches
        views_and_images = crops.pixels.shape[:2]
        given = (result.summary, result.patches, result.aggregated, queries, residual)
        split: list[Any] = [None if x is None else x.unflatten(0, views_and_images) for x in given]
        return Features(split[0], split[1], tokens.grid, split[2], queries=split[3], residual=split[4])

    def _tokens(self, pixels: Tensor, cues: Cues, wanted: Wanted) -> Tokens:
        """The backbone's output. Not every backbone has the arguments queries and residual: passed only if needed."""
        mask = None if cues.mask is None else cues.mask.flatten(0, 1)
        extra: dict[str, Any] = {}
        if cues.queries is not None:
            extra["queries"] = replace(cues.queries, positions=cues.queries.positions.flatten(0, 1))
        if wanted.residual and self.backbone.has_class_token:
            extra["residual"] = True
        return self.backbone(pixels, mask, **extra)

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
