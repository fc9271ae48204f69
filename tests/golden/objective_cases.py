"""Runs objectives on recorded logits. It can be imported, so that other processes can run it too.

The features are the logits, the head returns its input, and the prototypes are unit vectors: what remains to compute is
what the objective, its targets and `Prototypes.forward` do.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import harness
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import pad

from patchlight.heads.prototypes import Prototypes
from patchlight.objectives.contrast import unit_rows
from patchlight.objectives.dino import Dino, DinoOptions
from patchlight.objectives.ibot import Ibot, IbotOptions
from patchlight.objectives.moby import Moby
from patchlight.objectives.moco_v3 import MocoV3, MocoV3Options
from patchlight.objectives.selfpatch import SelfPatch, SelfPatchOptions
from patchlight.objectives.targets import Center, Sinkhorn
from patchlight.objectives.weighted import WeightedObjectives
from patchlight.records import Clock, Crops, Cues, Features, Now, Side, Views, now_at

STEPS_PER_EPOCH = 7


class LogitsHead(nn.Module):
    """A head whose logits are its input."""

    def __init__(self, width: int, count: int, patch_count: int | None = None):
        super().__init__()
        self.prototypes = unit_prototypes(width, count)
        self.patch_prototypes = unit_prototypes(width, patch_count) if patch_count else self.prototypes

    def forward(self, x: Tensor) -> Tensor:
        return x


def unit_prototypes(width: int, count: int) -> Prototypes:
    """Prototype k is the unit vector of coordinate k."""
    prototypes = Prototypes(width, count).requires_grad_(False)
    prototypes.weight_v.copy_(torch.eye(count, width))
    return prototypes


@dataclass
class GivenMasks:
    """Returns given masks [V, B, N]; rows() has room for a few patches more than they mask."""

    mask: Tensor
    padding: int = 3
    on_host: ClassVar[bool] = True

    def rows(self, views: int, batch: int, grid: tuple[int, int]) -> int:
        return int(self.mask.sum()) + self.padding

    def __call__(self, first: int, views: int, batch: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        return self.mask


def clock_of(epoch: int) -> Clock:
    return Clock(
        step=epoch * STEPS_PER_EPOCH + 2, total=10**6, images_seen=epoch * 1000, steps_per_epoch=STEPS_PER_EPOCH
    )


def now_of(objective, epoch: int = 0) -> Now:
    """What an objective, or all of a run, get in an epoch."""
    clock = clock_of(epoch)
    return now_at(clock, objective.schedule(clock))


def by_crop(x: Tensor, batch: int, width: int | None = None) -> Tensor:
    """[crops * B, ...] to [crops, B, ...], filled up with zeros to a width."""
    x = x.unflatten(0, (-1, batch))
    return x if width is None else pad(x, (0, width - x.shape[-1]))


def views_of(batch: int, crops: int = 2) -> Views:
    """Views whose shape alone matters."""
    global_crops = Crops(
        torch.zeros(crops, batch, 3, 1, 1), torch.zeros(crops, batch, 4), torch.zeros(crops, batch) > 0
    )
    return Views(global_crops, None, None, torch.arange(batch))


def square(patches: int) -> tuple[int, int]:
    side = round(patches**0.5)
    return side, side


def cls_features(logits: Tensor) -> Features:
    """Features [V, B, K] without patches."""
    return Features(logits, logits.new_zeros(*logits.shape[:2], 0, 1), (0, 0))


def dino_options(config: dict, **others) -> DinoOptions:
    return DinoOptions(
        prototypes=config["out_dim"],
        bottleneck=config["out_dim"],
        student_temperature=config["student_temp"],
        center_momentum=config["center_momentum"],
        **schedule(config),
        **others,
    )


def schedule(config: dict) -> dict:
    return {
        "teacher_temperature": config["teacher_temp"],
        "warmup_teacher_temperature": config.get("warmup_teacher_temp", config["teacher_temp"]),
        "warmup_epochs": config.get("warmup_teacher_temp_epochs", 0),
    }


def dino_step(tensors: dict, objective: Dino, batch: int, epoch: int = 0) -> dict:
    """A step on recorded `input.*` logits; returns by key what must equal the recorded values."""
    logits = tensors["input.student_logits"].clone().requires_grad_()
    teacher_logits = by_crop(tensors["input.teacher_logits"], batch)
    views = by_crop(logits, batch)
    count = logits.shape[1]
    of_globals, of_locals = views.tensor_split([len(teacher_logits)])
    student = Side(cls_features(of_globals), cls_features(of_locals) if len(of_locals) else None)
    student = with_head(student, LogitsHead(count, count))
    teacher = with_head(Side(cls_features(teacher_logits)), LogitsHead(count, count))
    now = now_of(objective, epoch)
    before = objective.target.center.clone()
    loss = objective(student, teacher, views_of(batch, len(teacher_logits)), Cues(), now)["dino/cls"]
    loss.backward()
    objective.after_step()
    return {
        "input.center": before[None],
        "output.loss": loss.detach(),
        "grad.input.student_logits": logits.grad,
        "output.center": objective.target.center[None],
    }


def ibot_objective(case: harness.Case) -> Ibot:
    config = case.config
    shared = config["out_dim"] == config["patch_out_dim"]  # the loss gets logits, whichever head they are from
    options = IbotOptions(
        prototypes=config["out_dim"],
        patch_prototypes=None if shared else config["patch_out_dim"],
        bottleneck=max(config["out_dim"], config["patch_out_dim"]),
        student_temperature=config["student_temp"],
        patch_teacher_temperature=config["teacher_patch_temp"],
        warmup_patch_teacher_temperature=config["warmup_teacher_patch_temp"],
        center_momentum=config["center_momentum"],
        patch_center_momentum=config["center_momentum2"],
        patch_start_epoch=config.get("mim_start_epoch", 0),
        **schedule(config),
    )
    return Ibot(GivenMasks(torch.zeros(0)), options)


def ibot_step(tensors: dict, objective: Ibot, config: dict, epoch: int) -> dict:
    """As `dino_step`. Class and patch logits may differ in number; both are filled up to the same width."""
    o, batch = objective.options, config["batch"]
    names = [f"student_{kind}" for kind in ("cls", "patch", "local_cls") if f"input.student_{kind}" in tensors]
    leaves = {name: tensors[f"input.{name}"].clone().requires_grad_() for name in names}
    wide = {k: by_crop(x, batch, o.bottleneck) for k, x in (leaves | teacher_inputs(tensors)).items()}
    head = LogitsHead(o.bottleneck, o.prototypes, o.patch_prototypes)
    masks = [tensors[f"input.mask_crop{crop}"] for crop in range(len(wide["student_cls"]))]
    mask, grid = torch.stack(masks).flatten(2), tuple(masks[0].shape[1:])
    local = cls_features(wide["student_local_cls"]) if "student_local_cls" in wide else None
    student = Side(Features(wide["student_cls"], wide["student_patch"], grid), local, head=head)
    teacher = Side(Features(wide["teacher_cls"], wide["teacher_patch"], grid), head=head)
    objective.masks.mask = mask
    now, views = now_of(objective, epoch), views_of(batch, len(mask))
    before = objective.target.center.clone(), objective.patch_target.center.clone()
    cues = objective.cue(views, grid, now)
    assert torch.equal(cues.mask, mask & (epoch >= o.patch_start_epoch))
    # Before that epoch it is the released loader that masks nothing, not the loss.
    terms = objective(student, teacher, views, Cues(mask=mask), now)
    lambdas = (config.get(name, 1.0) for name in ("lambda1", "lambda2"))
    weighted = [w * terms[name] for w, name in zip(lambdas, ("ibot/cls", "ibot/patch"), strict=True)]  # as recorded
    loss = sum(weighted)
    loss.backward()
    objective.after_step()
    return {f"grad.input.{k}": x.grad for k, x in leaves.items()} | {
        "input.center_cls": before[0][None],
        "input.center_patch": before[1][None, None],
        "output.loss": loss.detach(),
        "output.loss_cls": weighted[0].detach(),
        "output.loss_patch": weighted[1].detach(),
        "output.center_cls": objective.target.center[None],
        "output.center_patch": objective.patch_target.center[None, None],
    }


def teacher_inputs(tensors: dict) -> dict:
    return {k[len("input.") :]: x for k, x in tensors.items() if k in ("input.teacher_cls", "input.teacher_patch")}


def selfpatch_objectives(config: dict) -> tuple[Dino, SelfPatch]:
    """The released loss is both, with DINO's center over all crops."""
    patch_options = SelfPatchOptions(
        prototypes=config["out_dim_patch"],
        bottleneck=config["out_dim_patch"],
        teacher_sees_local=config["local_crops"] > 0,
        student_temperature=config["student_temp"],
        center_momentum=config["center_momentum"],
        **schedule(config),
    )
    return Dino(dino_options(config, center_over="all")), SelfPatch(patch_options)


def selfpatch_step(
    tensors: dict, objectives: tuple[Dino, SelfPatch], batch: int, weight: float, epoch: int = 0
) -> dict:
    """As `dino_step`, for both objectives together."""
    dino, selfpatch = objectives
    sizes = [size for size in ("global", "local") if f"input.student_{size}_cls" in tensors]
    names = [f"student_{size}_{kind}" for size in sizes for kind in ("cls", "patch")]
    leaves = {name: tensors[f"input.{name}"].clone().requires_grad_() for name in names}
    student = {size: recorded_features(leaves, f"student_{size}", batch) for size in sizes}
    recorded = {k[len("input.") :]: x for k, x in tensors.items() if k.startswith("input.teacher_")}
    teacher = {size: recorded_features(recorded, f"teacher_{size}", batch) for size in sizes}
    now, views, terms = (
        now_of(WeightedObjectives(objectives), epoch),
        views_of(batch, len(student["global"].summary)),
        {},
    )
    before = dino.target.center.clone(), selfpatch.target.center.clone()
    for objective in objectives:
        head = LogitsHead(objective.options.prototypes, objective.options.prototypes)
        sides = [Side(side["global"], side.get("local"), head=head) for side in (student, teacher)]
        terms |= objective(*sides, views, Cues(), now)
    loss = terms["dino/cls"] + weight * terms["selfpatch/patch"]
    loss.backward()
    for objective in objectives:
        objective.after_step()
    return {f"grad.input.{k}": x.grad for k, x in leaves.items()} | {
        "input.center_cls": before[0][None, None],
        "input.center_patch": before[1][None],
        "output.loss": loss.detach(),
        "output.loss_cls": terms["dino/cls"].detach(),
        "output.loss_patch": terms["selfpatch/patch"].detach(),
        "output.center_cls": dino.target.center[None, None],
        "output.center_patch": selfpatch.target.center[None],
    }


def recorded_features(logits: dict, name: str, batch: int) -> Features:
    """Patch logits serve as patches and as neighbors: the student uses the former, the teacher the latter."""
    summary = by_crop(logits[f"{name}_cls"].squeeze(1), batch)
    patches = by_crop(logits[f"{name}_patch"], batch)
    return Features(summary, patches, square(patches.shape[2]), neighbors=patches)


def with_head(side: Side, head: nn.Module) -> Side:
    return Side(side.global_crops, side.local_crops, head=head)


def start(target: Center, center: Tensor) -> None:
    """Sets the recorded center; later steps continue from their own."""
    target.center.copy_(center.flatten())


def dino_on_a_rank(case: harness.Case, rank: int) -> dict:
    objective = Dino(dino_options(case.config))
    start(objective.target, case["input.center"])
    return dino_step(case.under(f"rank{rank}."), objective, case.config["batch_per_rank"])


def selfpatch_on_a_rank(case: harness.Case, rank: int) -> dict:
    objectives = selfpatch_objectives(case.config)
    start(objectives[0].target, case["input.center_cls"])
    start(objectives[1].target, case["input.center_patch"])
    config = case.config
    return selfpatch_step(case.under(f"rank{rank}."), objectives, config["batch_per_rank"], config["patch_weight"])


def one_direction(objective: MocoV3 | Moby, queries: Tensor, keys: Tensor) -> Tensor:
    """When both views are the same, the sum over both directions is twice one direction."""
    return objective.contrast(queries.expand(2, -1, -1), keys.expand(2, -1, -1)) / 2


def moco_on_a_rank(case: harness.Case, rank: int) -> tuple[Tensor, Tensor]:
    return moco_loss_and_gradient(case["q"][rank], case["k"][rank], float(case.meta["T"]))


def moco_loss_and_gradient(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    q = q.clone().requires_grad_()
    loss = one_direction(MocoV3(MocoV3Options(temperature=temperature)), unit_rows(q), unit_rows(k))
    loss.backward()
    return loss.detach(), q.grad


def targets_on_a_rank(rank: int, rows: tuple[Tensor, Tensor], directions: Tensor) -> tuple[Tensor, Tensor]:
    """The moved center and Sinkhorn's bias, of this rank's rows."""
    center = Center(len(directions))
    center(rows[rank], directions, 0.1)
    center.after_step()
    return center.center, Sinkhorn()(rows[rank], directions, 0.1)


def in_two_processes(work, *arguments) -> list:
    """[work(rank, *arguments) of rank 0, of rank 1], each in a process of its own; `work` must be importable."""
    return in_processes(2, work, *arguments)


def in_processes(world: int, work, *arguments) -> list:
    """As `in_two_processes`, in `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one_process, (world, folder, work, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def recorded_in_processes(case: harness.Case, work) -> list[dict]:
    """`work(case, rank)` on every rank of a recorded case."""
    world = int((case.config or case.meta)["world_size"])
    return in_processes(world, _with_case, str(case.path), work)


def _with_case(rank: int, path: str, work) -> dict:
    return work(harness.Case(Path(path)), rank)


def _one_process(rank: int, world: int, folder: str, work, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
