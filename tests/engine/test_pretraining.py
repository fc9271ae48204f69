"""Pretraining without the trainer: the same numbers, any backbone, any number of processes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import fields
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
from engine.tiny_run import (
    DINO,
    IBOT,
    MOBY,
    MOCO,
    SELFPATCH,
    SERE,
    NoiseLoader,
    on_processes,
    step_values,
    tiny_run,
    tiny_trainer,
    whole,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import patchlight
from patchlight.backbones.architectures import build_backbone
from patchlight.data.masking import FixedMasks
from patchlight.data.policy import CropPolicy, CropSpec, dino_policy
from patchlight.engine.assembly import backbone_of
from patchlight.engine.optim import Update
from patchlight.objectives import OBJECTIVES, DinoOptions, IbotOptions, MobyOptions, PqclOptions, SereOptions
from patchlight.pretraining import Pretraining
from patchlight.records import Views
from patchlight.run import Run

LENGTH = {"steps": 20, "steps_per_epoch": 5}


def equal(x: Tensor, y: Tensor) -> None:
    assert torch.equal(x, y)


def own_of(run: Run) -> Pretraining:
    """What a run trains, for a loop of one's own."""
    masks = FixedMasks(run.objectives.masks, run.parallel.seed)
    options, crops, summary = run.objectives.options, run.data.crops, run.model.summary
    return Pretraining(backbone_of(run.model), options, crops, **LENGTH, summary=summary, masks=masks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", [(DINO, SELFPATCH), (IBOT, SERE)], ids=["dino+selfpatch", "ibot+sere"])
def test_a_step_is_the_trainers_to_the_bit(options, accumulate, precision):
    """Losses, weights, centers, temperatures and masks, over three steps. The trainer's AdamW moves the teacher in its own sweep,
    which a CPU may round otherwise than PyTorch's lerp: the teacher is held to that, and each step begins with the same one."""
    run = tiny_run("", options=options, parallel={"precision": precision, "accumulate": accumulate})
    trainer, loader = tiny_trainer(run), NoiseLoader(run)
    own = own_of(run)
    pairs = [(getattr(own, name), getattr(trainer, name)) for name in ("student", "teacher", "objectives")]
    for mine, theirs in pairs:
        mine.load_state_dict(theirs.state_dict())
    update = Update(own.student, None, run.optim, trainer.mesh)
    for number in range(3):
        rates = trainer.step_values.schedule(trainer.clock)
        trainer.step()
        losses = []
        for _ in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                loss, terms = own(next(loader))
            (loss / accumulate).backward()
            losses.append(terms["loss"] / accumulate)
        names = ("lr", "weight_decay", "momentum")
        update.step(terms, step_values(*(rates[name] for name in names), freeze=rates["freeze_prototypes"] > 0))
        own.after_step(rates["momentum"])
        assert torch.equal(sum(losses), trainer.metrics.steps[number]["loss"])
        assert terms.keys() <= trainer.metrics.steps[number].keys()
        for mine, theirs in pairs:
            state = theirs.state_dict()
            same = partial(torch.testing.assert_close, rtol=3e-7, atol=1e-9) if mine is own.teacher else equal
            for name, tensor in mine.state_dict().items():
                same(tensor, state[name])
        own.teacher.load_state_dict(trainer.teacher.state_dict())
    assert own.clock == trainer.clock


class Cells(nn.Module):
    """Not a timm model: a feature map, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


class Rows(Cells):
    """Tokens, the first of which is a class token."""

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = super().forward(pixels).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


SMALL = {"num_classes": 0, "img_size": 32}
VIT = {**SMALL, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
OURS = {"width": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32, "drop_path": 0.3}
BACKBONES = {
    "ours": lambda: build_backbone("vit_tiny", **OURS, positions="sincos"),
    "ours, raw": lambda: build_backbone("vit_tiny", **OURS, class_token=False),
    "timm ViT": lambda: timm.create_model("vit_tiny_patch16_224", **VIT, drop_path_rate=0.3),
    "timm ViT, raw": lambda: timm.create_model("vit_tiny_patch16_224", **VIT, class_token=False, global_pool="avg"),
    "timm EVA": lambda: timm.create_model("eva02_tiny_patch14_224", **VIT),
    "timm Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        **SMALL,
        patch_size=1,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        window_size=4,
        strict_img_size=False,
    ),
    "timm ResNet": lambda: timm.create_model("resnet18", num_classes=0, channels=(4, 8, 8, 16), output_stride=8),
    "timm ConvNeXt": lambda: timm.create_model(
        "convnext_atto", num_classes=0, dims=(4, 8, 8, 16), depths=(1, 1, 1, 1), output_stride=8
    ),
    "map": Cells,
    "tokens": Rows,
}
SIZES = {"prototypes": 32, "bottleneck": 8, "hidden": 16, "out": 8, "queue": 16, "global_points": 4, "local_points": 3}


def small(kind: type):
    names = {field.name for field in fields(kind)}
    return kind(**{name: size for name, size in SIZES.items() if name in names})


HOSTS = {"SelfPatchOptions": [DinoOptions], "SelfPatchContrastOptions": [MobyOptions], "PqclOptions": [DinoOptions]}
HOSTS["SereOptions"] = [DinoOptions]
# What a backbone cannot carry, and the words of the refusal. PQCL needs our ViT with fixed positions.
CANNOT = {
    **{(name, "IbotOptions"): "takes masks" for name in ("timm Swin", "timm ResNet", "timm ConvNeXt", "map", "tokens")},
    **{(name, "PqclOptions"): "takes queries" for name in BACKBONES if not name.startswith("ours")},
    ("ours, raw", "PqclOptions"): "need fixed positions, got positions='learned'",
    **{
        (name, kind): "needs a backbone without a class token|need summary='class_attention', got"
        for name in ("ours", "timm ViT", "timm EVA", "tokens")
        for kind in ("SelfPatchOptions", "SelfPatchContrastOptions")
    },
}


def views_of(crops: CropPolicy, images: int = 4) -> Views:
    """Noise with the crops of a policy."""
    run = tiny_run("", data={"crops": dino_policy(2, 16, 12), "batch_per_rank": images})
    loader = NoiseLoader(run)
    loader.crops = crops
    return next(loader)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_objective_on_every_backbone(name, kind):
    """It trains and moves the teacher, or is refused with what the backbone lacks."""
    crops = dino_policy(1, 32, 24)
    options = [small(host) for host in HOSTS.get(kind, ())] + [small(OBJECTIVES[kind])]
    if kind == "PqclOptions":
        crops = CropPolicy(crops.global_crops, query_crops=(CropSpec(1, 16, (0.1, 0.3)),))
    backbone = BACKBONES[name]()
    summary = "class_attention" if kind.startswith("SelfPatch") else "mean"
    if kind in ("DinoOptions", "IbotOptions") and name in ("ours", "timm ViT", "timm EVA", "tokens"):
        summary = "cls"
    if (name, kind) in CANNOT:
        with pytest.raises(ValueError, match=CANNOT[name, kind]):
            Pretraining(backbone, options, crops, **LENGTH, summary=summary)
        return
    own = Pretraining(backbone, options, crops, **LENGTH, summary=summary)
    before = copy.deepcopy(own.teacher.state_dict())
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3)
    for _ in range(2):
        loss, terms = own(views_of(crops))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        own.after_step(0.5)
    assert all(term.isfinite() and not term.requires_grad for term in terms.values())
    moved = {name for name, p in own.teacher.named_parameters() if not torch.equal(p, before[name])}
    still = {name for name, p in own.student.named_parameters() if name in before and p.requires_grad} - moved
    unused = (
        "mask_token",
        "fc_norm.weight",
        "fc_norm.bias",
        "head.norm.weight",
        "head.norm.bias",
    )  # the last four: timm's
    # Attention does not depend on the bias of keys.
    assert not [name for name in still if not name.endswith((*unused, ".k.bias"))], still
    assert any(name.startswith("backbone.") for name in moved)


def test_the_teacher_drops_nothing():
    for make in (BACKBONES["ours"], BACKBONES["timm ViT"], lambda: nn.Sequential(Cells(), nn.Dropout(0.5))):
        own = Pretraining(make(), [small(DinoOptions)], dino_policy(0, 32), **LENGTH, summary="mean")
        views = views_of(dino_policy(0, 32))
        first, second = (own.teacher(views).global_crops.patches for _ in range(2))
        assert torch.equal(first, second)
        first, second = (own.student(views).global_crops.patches for _ in range(2))
        assert not torch.equal(first, second)


def test_a_saved_training_continues_with_the_same_loss():
    """The clock decides masks and temperatures; centers are in the state too."""
    options = [IbotOptions(**IBOT_SIZES, warmup_epochs=4), SereOptions(global_points=4, local_points=3)]
    crops = dino_policy(1, 32, 16)

    def fresh() -> Pretraining:
        return Pretraining(build_backbone("vit_tiny", **{**OURS, "drop_path": 0.0}), options, crops, **LENGTH)

    own, views = fresh(), views_of(crops)
    for _ in range(6):  # into the second epoch
        own(views)[0].backward()
        own.after_step(0.9)
    state = copy.deepcopy(own.state_dict())
    again = fresh()
    assert again(views)[1]["loss"] != own(views)[1]["loss"]
    again.load_state_dict(state)
    own.load_state_dict(state)
    assert again.clock == own.clock and again.clock.step == 6 and again.clock.images_seen == 24
    assert torch.equal(again(views)[0], own(views)[0])
    again.clock = fresh().clock
    assert not torch.equal(again(views)[0], own(views)[0]), "the clock counts"


@pytest.mark.parametrize("options", [(IBOT,), (MOBY,)], ids=["ibot", "moby"])
def test_a_step_that_is_left_out_leaves_nothing(options):
    """Neither in centers, nor in the queue, nor in the clock; the next step is the one that would have come."""
    own = own_of(tiny_run("", options=options))
    views, other = views_of(own.crops, 8), views_of(own.crops, 8)
    own(views)
    own.after_step(0.9)
    again = copy.deepcopy(own)
    broken = views.with_tensors(x * torch.nan if x.dtype == torch.float32 else x for x in views.tensors())
    assert not own(broken)[0].isfinite()
    own.skip_step()
    for module in (own, again):
        module(other)
        module.after_step(0.9)
    assert own.clock == again.clock
    state = again.state_dict()
    for name, tensor in own.state_dict().items():
        assert (
            name == "_extra_state" or "running" in name or "num_batches" in name or torch.equal(tensor, state[name])
        ), name


IBOT_SIZES = {"prototypes": 32, "bottleneck": 8, "hidden": 16}


def in_a_process(options: tuple) -> dict:
    """Two steps of two batches in DistributedDataParallel, as anybody would write them: with and without no_sync."""
    dist.init_process_group("gloo")
    try:
        run = tiny_run("", options=options, data={"batch_per_rank": 4})
        torch.manual_seed(dist.get_rank())  # DistributedDataParallel copies the first rank's weights
        own = own_of(run)
        return trained(DistributedDataParallel(own), own, run, dist.get_rank(), 2)
    finally:
        dist.destroy_process_group()


def trained(module: nn.Module, own: Pretraining, run: Run, rank: int, world: int) -> dict:
    loader = NoiseLoader(run)
    loader.rank, loader.world = rank, world
    optimizer = torch.optim.SGD(own.student.parameters(), lr=0.1)
    for number in range(2):
        for last in (False, True):
            with module.no_sync() if world > 1 and number == 0 and not last else nullcontext():
                loss, _ = module(next(loader))
                (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        own.after_step(0.9)
    state = own.state_dict()
    return {"clock": state.pop("_extra_state"), **whole(state)}


@pytest.mark.parametrize("options", [(DINO, SELFPATCH), (IBOT,), (MOBY,)], ids=["dino+selfpatch", "ibot", "moby"])
def test_two_processes_compute_what_one_does(options):
    """MoBY's heads have BatchNorm, which sees each process's images; its processes must still agree."""
    first, second = on_processes(2, in_a_process, options)
    torch.manual_seed(0)
    run = tiny_run("", options=options, data={"batch_per_rank": 8})
    own = own_of(run)
    expected = trained(own, own, run, 0, 1)
    assert first.pop("clock") == second.pop("clock") == expected.pop("clock")
    for name, tensor in expected.items():
        assert "running" in name or (first[name] == second[name]).all(), name
        bound = 1e-7 if name.endswith("center") else 5e-5  # of rounding; sums of one rank alone would be 3e-7 off
        assert options == (MOBY,) or abs(first[name] - tensor).max() < bound, name


def tiny(*options, **given) -> Pretraining:
    backbone = given.pop("backbone", None) or build_backbone("vit_tiny", **OURS)
    crops = given.pop("crops", dino_policy(1, 32, 16))
    return Pretraining(backbone, options or [small(DinoOptions)], crops, **{**LENGTH, **given})


WRONG = [
    (lambda: tiny(steps=0), r"steps must be a whole number in \[1, 2\^53\), got 0; pass epochs"),
    (lambda: tiny(steps_per_epoch=2.5), r"steps_per_epoch must be a whole number .*got 2.5; pass len"),
    (lambda: tiny(summary="token"), r"summary must be one of cls, class_attention, mean, got 'token'; pick"),
    (lambda: tiny(DINO, DINO), r"may name each objective once, got .*; remove one"),
    (lambda: Pretraining(Cells(), [], **LENGTH), r"at least one objective, got none; add"),
    (lambda: tiny(summary="class_attention"), r"without a class token, got VisionTransformer with one; build it"),
    (lambda: tiny(backbone=Cells()), r"summary='cls' needs a backbone that has a class token, got Cells; use 'mean'"),
    (lambda: tiny(small(PqclOptions)), r"needs iBOT or DINO beside it"),
    (lambda: tiny(crops=dino_policy(1, 32, 12)), r"must be multiples of the patch size 8, got 12x12; resize"),
    (
        lambda: tiny(weights={"dino/clss": 1.0})(views_of(dino_policy(1, 32, 16))),
        r"must name loss terms, got \['dino/clss'\]",
    ),
    (
        lambda: tiny(backbone=timm.create_model("vit_tiny_patch16_224")),
        r"of 224x224 pixels only, got 32x32; create it with",
    ),
    (lambda: tiny(backbone=build_backbone), r"A backbone must be an nn.Module, got a function; pass the network"),
    (lambda: tiny()(torch.zeros(2, 3, 32, 32)), r"takes Views, got a Tensor; make them with MultiCrop"),
    (
        lambda: tiny()(views_of(dino_policy(0, 32))),
        r"the crops of the policy, .*got {'global_crops': \(2, 32\)}; pass the",
    ),
    (lambda: tiny().eval()(views_of(dino_policy(1, 32, 16))), r"in training mode, got evaluation mode, .*; evaluate"),
    (lambda: tiny().after_step(0.9), r"must follow a forward, got none since the last step; call it once"),
    (lambda: stepped(tiny(), 1.5), r"momentum must be a number in \[0, 1\], got 1.5; 0.996 is usual"),
    (lambda: tiny(MOCO)(views_of(dino_policy(1, 32, 16), 1)), r"moco_v3 has BatchNorm, .*got 1; pass larger"),
    (lambda: tiny(MOBY)(views_of(dino_policy(1, 32, 16), 3)), r"divides its queue of 32, got 3; change"),
]


def stepped(own: Pretraining, momentum: float) -> None:
    own(views_of(own.crops))
    own.after_step(momentum)


@pytest.mark.parametrize(("build", "sentence"), WRONG)
def test_what_cannot_work_is_a_sentence(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


def test_the_public_names_are_these():
    assert patchlight.Pretraining is Pretraining
    assert patchlight.build_backbone is build_backbone
    assert patchlight.wrap_backbone(Cells(), 32).width == 24
    assert patchlight.MultiCrop(dino_policy()).policy == dino_policy()
