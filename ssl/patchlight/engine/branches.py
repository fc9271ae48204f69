"""The two branches, a student that learns and a teacher that follows it, and the objectives that look at both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbones.interface import build_backbone
from ..data.masking import FixedMasks, ReleasedMasks
from ..heads.summary import ClassAttentionSummary, ClassTokenSummary, MeanSummary
from ..objectives.dino import Dino, DinoOptions
from ..objectives.ibot import Ibot, IbotOptions
from ..objectives.interface import NeighborRule, Objective
from ..objectives.selfpatch import SelfPatch, SelfPatchOptions
from ..objectives.sere import Sere, SereOptions
from ..records import Clock, Crops, Features, Side, Views
from ..run import Model, Run
from .parallel import local

# FSDP2 looks for tensors in what a module returns; torch 2.11 looks into registered classes only.
torch.export.register_dataclass(Features)

BranchFeatures = tuple[Features, Features | None]  # of global crops, of local crops


class Branch(nn.Module):
    """A backbone, a summary head, and the heads of the objectives by their names."""

    def __init__(
        self,
        backbone: nn.Module,
        summary: nn.Module,
        heads: dict[str, nn.Module],
        predictors: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.summary = backbone, summary
        self.heads = nn.ModuleDict(heads)
        self.predictors = nn.ModuleDict(predictors or {})

    def forward(
        self,
        views: Views,
        mask: Tensor | None = None,
        local: bool = True,
        neighbors: NeighborRule | None = None,
        residual: bool = False,
    ) -> BranchFeatures:
        """Features of global crops (mask [V, B, N] hides patches) and of local crops if wanted and there."""
        global_crops = self._look(views.global_crops, mask, neighbors, residual)
        if not local or views.local_crops is None:
            return global_crops, None
        return global_crops, self._look(views.local_crops, None, neighbors, residual)

    def _look(self, crops: Crops, mask: Tensor | None, neighbors: NeighborRule | None, residual: bool) -> Features:
        """One pass over all crops of a size, V x B images at once."""
        asked = {"residual": True} if residual else {}
        tokens = self.backbone(crops.pixels.flatten(0, 1), None if mask is None else mask.flatten(0, 1), **asked)
        seen = self.summary(tokens, neighbors)
        summary, patches, aggregated, before = (
            None if x is None else x.unflatten(0, crops.pixels.shape[:2])
            for x in (seen.summary, seen.patches, seen.aggregated, tokens.residual)
        )
        return Features(summary, patches, tokens.grid, aggregated, residual=before)

    def side(self, name: str, features: BranchFeatures, local: bool = True) -> Side:
        """What the objective of this name sees of the branch."""
        own = {
            kind: modules[name]
            for kind, modules in (("head", self.heads), ("predictor", self.predictors))
            if name in modules
        }
        return Side(features[0], features[1] if local else None, **own)


class Student(Branch):
    """The branch that gradients move."""


class Teacher(Branch):
    """The branch that follows the student. It has no gradients, and stays in training mode, as released."""

    def start_from(self, student: Student) -> None:
        """Becomes a copy of the student, predictors apart."""
        theirs = student.state_dict()
        self.load_state_dict({name: theirs[name] for name in self.state_dict() if name in theirs})
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, student: Student, momentum: float, refused: Tensor | None = None) -> None:
        """Moves each parameter by 1 - momentum towards the student's, unless refused is 1; buffers stay its own.

        On a CPU a lerp. Elsewhere one in three multi-tensor kernels, whose weight stays on the device, where the refusal is.
        """
        by_name = dict(student.named_parameters())
        named = dict(self.named_parameters())
        mine, theirs = [local(parameter) for parameter in named.values()], [local(by_name[name]) for name in named]
        weight = torch.full((), 1 - momentum, dtype=mine[0].dtype, device=mine[0].device)
        weight = weight if refused is None else weight * (1 - refused)
        if weight.device.type == "cpu":
            torch._foreach_lerp_(mine, theirs, weight.item())
            return
        gap = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(gap, weight)
        torch._foreach_add_(mine, gap)


def build_branches(model: Model, objectives: Sequence[Objective]) -> tuple[Student, Teacher]:
    """Both branches with a head per objective; the teacher starts as a copy of the student."""
    student, teacher = Student(*_parts(model, objectives)), Teacher(*_parts(model, objectives, teacher=True))
    teacher.start_from(student)
    return student, teacher


def _parts(model: Model, objectives: Sequence[Objective], teacher: bool = False) -> tuple:
    """Backbone, summary, heads and predictors."""
    backbone = build_backbone(
        model.arch,
        patch_size=model.patch_size,
        image_size=model.image_size,
        drop_path=0.0 if teacher else model.drop_path,
        class_token=model.summary == "cls",
        position_resize=model.position_resize,
        **model.sizes,
    )
    for one in objectives:
        one.adapt(backbone.width, backbone.heads)
    heads = {one.name: head for one in objectives if (head := one.head(backbone.width)) is not None}
    predictors = {one.name: part for one in objectives if (part := one.predictor(backbone.width)) is not None}
    return backbone, _summary(model.summary, backbone), heads, {} if teacher else predictors


def _summary(kind: str, backbone: nn.Module) -> nn.Module:
    if kind == "class_attention":
        return ClassAttentionSummary(backbone.width, backbone.heads)
    if kind == "mean":
        return MeanSummary(backbone.width)  # the backbone has no final norm without a class token
    return ClassTokenSummary()


def check_teacher_student(teacher: Teacher, student: Student) -> None:
    """The teacher must be a second network of the same shape that no gradient reaches."""
    theirs = {name for name, _ in student.named_parameters() if not name.startswith("predictors.")}
    mine = {name for name, _ in teacher.named_parameters()}
    if mine != theirs:
        raise ValueError(
            f"The teacher must have the student's parameters, got {sorted(mine ^ theirs)[:4]} in one of them only; "
            "build both with the same heads."
        )
    memory = {local(p).untyped_storage().data_ptr() for p in student.parameters() if local(p).numel()}
    shared = [n for n, p in teacher.named_parameters() if local(p).untyped_storage().data_ptr() in memory]
    if shared:
        raise ValueError(
            f"teacher aliases student: the teacher must own its memory, got {len(shared)} shared parameters such as "
            f"{shared[0]}; build a second network and copy the values."
        )
    learning = [name for name, p in teacher.named_parameters() if p.requires_grad]
    if learning:
        raise ValueError(f"The teacher must not collect gradients, got {learning[0]} that does; call start_from first.")


class WeightedObjectives(nn.Module):
    """All objectives of a run: what they need together, and their weighted sum."""

    def __init__(self, parts: Sequence[Objective], weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.weights = dict(weights or {})
        needs = [one.needs() for one in parts]
        self.teacher_sees_local = any(need.teacher_sees_local for need in needs)
        self.needs_local = any(need.local_crops for need in needs)
        self.needs_global = max((need.global_crops for need in needs), default=1)
        self.residual = any(need.residual for need in needs)
        self.neighbors = self._only("neighbors", [need.neighbors for need in needs])
        self.summary = self._only("summary", [need.summary for need in needs])
        self.masking = self._only("masks", [one if one.needs().masks else None for one in parts])

    def _only(self, what: str, wishes: list):
        """The wish of those objectives that have one; they share the branches, so they must agree."""
        wishes = [wish for wish in wishes if wish is not None]
        if any(wish != wishes[0] for wish in wishes):
            raise ValueError(f"Objectives must agree on {what}, got {wishes}; change the options of one of them.")
        return wishes[0] if wishes else None

    def mask(self, views: Views, grid: tuple[int, int], clock: Clock) -> Tensor | None:
        """[V, B, N] what the student does not get to see of its global crops."""
        return None if self.masking is None else self.masking.cue(views, grid, clock).mask

    def forward(
        self,
        student: tuple[Student, BranchFeatures],
        teacher: tuple[Teacher, BranchFeatures],
        views: Views,
        clock: Clock,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the unweighted terms by name."""
        terms: dict[str, Tensor] = {}
        for one in self.parts:
            taught = teacher[0].side(one.name, teacher[1], local=one.needs().teacher_sees_local)
            terms |= one(student[0].side(one.name, student[1]), taught, views, clock)
        unknown = self.weights.keys() - terms.keys()
        if unknown:
            raise ValueError(
                f"Objectives.weights must name loss terms, got {sorted(unknown)} where the terms are {sorted(terms)}; "
                "correct the name."
            )
        return sum(self.weights.get(name, 1.0) * term for name, term in terms.items()), terms

    def after_step(self, clock: Clock) -> None:
        for one in self.parts:
            one.after_step(clock)


def build_objectives(run: Run) -> WeightedObjectives:
    """The objectives of a run, checked against its model and data."""
    masks = {"fixed": FixedMasks, "released": ReleasedMasks}[run.objectives.mask_counts]
    build = {
        DinoOptions: Dino,
        IbotOptions: lambda options: Ibot(masks(run.objectives.masks, run.parallel.seed), options),
        SelfPatchOptions: SelfPatch,
        SereOptions: lambda options: Sere(options, local=bool(run.data.crops.local_crops)),
    }
    parts = [build[type(options)](options) for options in run.objectives.options]
    objectives = WeightedObjectives(parts, run.objectives.weights)
    if objectives.summary not in (None, run.model.summary):
        raise ValueError(
            f"The objectives need Model.summary={objectives.summary!r}, got {run.model.summary!r}; "
            "set it, or pool neighbors by mean."
        )
    global_crops = sum(spec.count for spec in run.data.crops.global_crops)
    if global_crops < objectives.needs_global:
        raise ValueError(
            f"The objectives need {objectives.needs_global} global crops per image, got a crop policy with {global_crops}; "
            "add some."
        )
    if objectives.needs_local and not run.data.crops.local_crops:
        raise ValueError(
            "The objectives need local crops, got a crop policy without; add some, or let the teacher see global crops only."
        )
    return objectives
