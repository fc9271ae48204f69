"""The two branches, a student that learns and a teacher that follows it, and the objectives that look at both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones.interface import build_backbone, offers_of
from ..data.masking import FixedMasks, ReleasedMasks
from ..heads.summary import build_summary
from ..objectives.dino import Dino, DinoOptions
from ..objectives.ibot import Ibot, IbotOptions
from ..objectives.interface import Objective
from ..objectives.moby import Moby, MobyOptions
from ..objectives.moco_v3 import MocoV3, MocoV3Options
from ..objectives.pqcl import Pqcl, PqclOptions, choose_host
from ..objectives.selfpatch import SelfPatch, SelfPatchOptions
from ..objectives.selfpatch_contrast import SelfPatchContrast, SelfPatchContrastOptions
from ..objectives.sere import Sere, SereOptions
from ..records import Clock, Crops, Cues, Features, Side, Tokens, Views, Wanted
from ..run import Model, Options, Run
from .dtensor import local
from .pairing import check_pairing

# FSDP2 looks for tensors in what a module returns; torch 2.11 looks into registered classes only.
torch.export.register_dataclass(Features)


class BranchFeatures(NamedTuple):
    """What a branch says of a batch."""

    global_crops: Features
    local_crops: Features | None = None
    query_crops: Features | None = None


class Branch(nn.Module):
    """A backbone, a summary head, and the heads of the objectives by their names.

    hosts: for an objective without a head, the name of the one whose head serves it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        summary: nn.Module,
        heads: dict[str, nn.Module],
        predictors: dict[str, nn.Module] | None = None,
        hosts: dict[str, str] | None = None,
        views_apart: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.summary = backbone, summary
        self.views_apart = views_apart  # each view is a batch of its own to the backbone
        self.heads = nn.ModuleDict(heads)
        self.predictors = nn.ModuleDict(predictors or {})
        self.hosts = dict(hosts or {})

    def forward(self, views: Views, cues: Cues | None = None, wanted: Wanted = Wanted()) -> BranchFeatures:  # noqa: B008 frozen
        """Features of global crops (with cues for them), and of what else is wanted and there."""
        local = wanted.local_crops and views.local_crops is not None
        return BranchFeatures(
            self._look(views.global_crops, wanted, cues),
            self._look(views.local_crops, wanted) if local else None,
            self._look(views.query_crops, Wanted()) if wanted.query_crops else None,
        )

    def _look(self, crops: Crops, wanted: Wanted, cues: Cues | None = None) -> Features:
        """One pass over all crops of a size, V x B images at once, or a pass per view where BatchNorm must tell them apart."""
        if self.views_apart:
            by_view = [self.backbone(pixels) for pixels in crops.pixels]  # a backbone with BatchNorm takes no cues
            tokens = replace(by_view[0], patches=torch.cat([view.patches for view in by_view]))
        else:
            tokens = self._read(crops.pixels.flatten(0, 1), cues or Cues(), wanted)
        seen = self.summary(tokens, wanted.neighbors)
        guesses = None if tokens.queries is None else self.summary.norm(tokens.queries)
        residual = None
        if wanted.residual:
            residual = tokens.residual if self.backbone.has_class_token else tokens.patches
        summary, patches, aggregated, guesses, residual = (
            None if x is None else x.unflatten(0, crops.pixels.shape[:2])
            for x in (seen.summary, seen.patches, seen.aggregated, guesses, residual)
        )
        return Features(summary, patches, tokens.grid, aggregated, queries=guesses, residual=residual)

    def _read(self, pixels: Tensor, cues: Cues, wanted: Wanted) -> Tokens:
        """The backbone is asked for queries and residual only where they are wanted, as not all of them take the words."""
        mask, asked = None if cues.mask is None else cues.mask.flatten(0, 1), {}
        if cues.queries is not None:
            asked["queries"] = replace(cues.queries, positions=cues.queries.positions.flatten(0, 1))
        if wanted.residual and self.backbone.has_class_token:
            asked["residual"] = True
        return self.backbone(pixels, mask, **asked)

    def head_of(self, name: str) -> nn.Module | None:
        """The head that an objective sees: its own, or its host's."""
        return dict(self.heads).get(self.hosts.get(name, name))

    def side(self, name: str, features: BranchFeatures, local: bool = True) -> Side:
        """What the objective of this name sees of the branch."""
        return Side(
            features.global_crops,
            features.local_crops if local else None,
            features.query_crops,
            self.head_of(name),
            dict(self.predictors).get(name),
        )


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

        On a CPU a lerp each. Elsewhere one in three multi-tensor kernels, whose weight stays on the device, where the refusal is.
        """
        by_name = dict(student.named_parameters())
        named = dict(self.named_parameters())
        mine, theirs = [local(parameter) for parameter in named.values()], [local(by_name[name]) for name in named]
        weight = torch.full((), 1 - momentum, dtype=mine[0].dtype, device=mine[0].device)
        weight = weight if refused is None else weight * (1 - refused)
        if weight.device.type == "cpu":
            for ours, followed in zip(mine, theirs, strict=True):
                ours.lerp_(followed, weight)
            return
        gap = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(gap, weight)
        torch._foreach_add_(mine, gap)


def build_branches(model: Model, objectives: Sequence[Objective]) -> tuple[Student, Teacher]:
    """Both branches with a head per objective; the teacher starts as a copy of the student."""
    student, teacher = Student(**_parts(model, objectives)), Teacher(**_parts(model, objectives, teacher=True))
    teacher.start_from(student)
    return student, teacher


def _parts(model: Model, objectives: Sequence[Objective], teacher: bool = False) -> tuple:
    """The arguments of a Branch."""
    backbone = build_backbone(
        model.arch,
        patch_size=model.patch_size,
        image_size=model.image_size,
        drop_path=0.0 if teacher else model.drop_path,
        **_transformer_options(model),
        **model.sizes,
    )
    if model.freeze_patch_embed:
        _freeze_patch_embed(model.arch, backbone)
    for one in objectives:
        one.adapt(backbone.width, backbone.heads)
    heads = {one.name: head for one in objectives if (head := one.head(backbone.width)) is not None}
    predictors = {one.name: part for one in objectives if (part := one.predictor(backbone.width)) is not None}
    hosts = {one.name: host for one in objectives if (host := one.needs().host) and one.name not in heads}
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in backbone.modules())
    views_apart = has_batch_norm and any(one.needs().views_apart for one in objectives)
    return {
        "backbone": backbone,
        "summary": build_summary(model.summary, backbone),
        "heads": heads,
        "predictors": {} if teacher else predictors,
        "hosts": hosts,
        "views_apart": views_apart,
    }


def _transformer_options(model: Model) -> dict:
    """What only a vision transformer can be told; another backbone is told what differs from usual, to refuse it."""
    options = {name: getattr(model, name) for name in ("position_resize", "positions", "start")}
    if "class_token" in offers_of(model.arch):
        return options | {"class_token": model.summary == "cls"}
    return {name: value for name, value in options.items() if value != getattr(Model, name)}


def _freeze_patch_embed(arch: str, backbone: nn.Module) -> None:
    if not hasattr(backbone, "patch_embed"):
        raise ValueError(
            f"Model.freeze_patch_embed needs a patch projection, got {arch}, which has none; leave it out."
        )
    backbone.patch_embed.requires_grad_(False)


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
        self._only("summary", [need.summary for need in needs])
        self.masking = self._only("masks", [one if one.needs().masks else None for one in parts])
        self.querying = self._only("queries", [one if one.needs().queries else None for one in parts])
        self.of_student = Wanted(residual=any(need.residual for need in needs))
        self.of_teacher = Wanted(
            local_crops=any(need.teacher_sees_local for need in needs),
            query_crops=self.querying is not None,
            neighbors=self._only("neighbors", [need.neighbors for need in needs]),
            residual=self.of_student.residual,
        )

    def _only(self, what: str, wishes: list):
        """The wish of those objectives that have one; they share the branches, so they must agree."""
        wishes = [wish for wish in wishes if wish is not None]
        if any(wish != wishes[0] for wish in wishes):
            raise ValueError(f"Objectives must agree on {what}, got {wishes}; change the options of one of them.")
        return wishes[0] if wishes else None

    def cue(self, views: Views, grid: tuple[int, int], clock: Clock) -> Cues:
        """What the student does not get to see of its global crops, and what it is asked beside them."""
        mask = None if self.masking is None else self.masking.cue(views, grid, clock).mask
        queries = None if self.querying is None else self.querying.cue(views, grid, clock).queries
        return Cues(mask, queries)

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


def build_objectives(run: Run, world: int = 1) -> WeightedObjectives:
    """The objectives of a run on so many processes, checked against its model and data."""
    parts = [build_objective(options, run) for options in run.objectives.options]
    objectives = WeightedObjectives(parts, run.objectives.weights)
    check_pairing(run, parts, world)
    return objectives


def build_objective(options: Options, run: Run) -> Objective:
    """The objective that these options describe."""
    masks = {"fixed": FixedMasks, "released": ReleasedMasks}[run.objectives.mask_counts]
    build = {
        DinoOptions: Dino,
        IbotOptions: lambda options: Ibot(masks(run.objectives.masks, run.parallel.seed), options),
        MocoV3Options: MocoV3,
        MobyOptions: Moby,
        SelfPatchOptions: SelfPatch,
        SelfPatchContrastOptions: SelfPatchContrast,
        PqclOptions: lambda options: Pqcl(choose_host(run.objectives.options), options),
        SereOptions: lambda options: Sere(options, local=bool(run.data.crops.local_crops)),
    }
    return build[type(options)](options)
