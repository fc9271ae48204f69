"""SERE on DINO and on iBOT through the engine: both terms fall, and two processes train like one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from engine.test_parallel import STEPS, assert_equal_runs
from engine.tiny_run import (
    DINO,
    IBOT,
    MOBY,
    MOCO,
    SERE,
    MetricsInMemory,
    largest_difference,
    on_processes,
    tiny_run,
    train_tiny,
)
from torch import Tensor, nn

from patchlight.data.policy import CropPolicy, CropSpec, dino_policy
from patchlight.engine.assembly import build_branches, build_objectives, build_trainer
from patchlight.engine.parallel import processes, synchronize_batch_norm
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.sere import SereOptions
from patchlight.recipes.compatibility import BACKBONES
from patchlight.records import Crops, Views
from patchlight.run import Data, Model, Objectives, Optim, Output, Parallel, Run, Schedule


class PictureLoader:
    """Eight smooth pictures, cropped and mirrored according to boxes and flips."""

    dataset_size, stall_seconds, replaced = 8, 0.0, 0

    def __init__(self, crops: CropPolicy, batches: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(8, 3, 7, 7, generator=generator)
        self.pictures = F.interpolate(coarse, size=(60, 60), mode="bicubic")
        self.batches = [
            Views(*[self.cut(specs, generator) for _, specs in crops.kinds()], None, torch.arange(8))
            for _ in range(batches)
        ]
        self.number = 0

    def cut(self, specs: tuple[CropSpec, ...], generator: torch.Generator) -> Crops:
        views, side = sum(spec.count for spec in specs), specs[0].size
        part = sum(specs[0].scale) / 2  # of the area
        size = (60 * part**0.5 * (0.8 + 0.4 * torch.rand(views, 8, 2, generator=generator))).clamp(max=60).round()
        box = torch.cat([((60 - size) * torch.rand(views, 8, 2, generator=generator)).round(), size], dim=-1)
        flip = torch.rand(views, 8, generator=generator) < 0.5
        images = [[self.crop(image, box[v, image], flip[v, image], side) for image in range(8)] for v in range(views)]
        return Crops(torch.stack([torch.stack(view) for view in images]), box, flip)

    def crop(self, image: int, box: Tensor, flip: Tensor, side: int) -> Tensor:
        x, y, w, h = (int(value) for value in box)
        cropped = F.interpolate(self.pictures[image : image + 1, :, y : y + h, x : x + w], size=(side, side))[0]
        return cropped.flip(-1) if flip else cropped

    def __next__(self) -> Views:
        self.number += 1
        return self.batches[self.number % len(self.batches)]


@pytest.mark.parametrize("host", [DINO, IBOT], ids=["dino", "ibot"])
def test_both_terms_fall(host, tmp_path):
    crops = dino_policy(2, 16, 8, (0.4, 1.0), (0.1, 0.4))
    run = tiny_run(
        tmp_path,
        options=(host, SERE),
        data={"loader": "procedural", "crops": crops, "batch_per_rank": 8, "workers": 0},
        optim={"base_lr": 5e-3 * 32, "warmup_epochs": 1, "teacher_momentum": 0.9, "freeze_prototypes_epochs": 0},
        schedule={"epochs": 15, "steps_per_epoch": 4},
    )
    metrics = MetricsInMemory()
    trainer = build_trainer(run, loader=PictureLoader(crops), metrics=metrics)
    for _ in range(60):
        trainer.step()
    assert not any(step["step/refused"] for step in metrics.steps)
    for term, drop in (("sere/spatial", 0.015), ("sere/channel", 0.1)):
        first, last = (
            sum(float(step[term]) for step in steps) / 4 for steps in (metrics.steps[:4], metrics.steps[-4:])
        )
        assert last < first - drop, f"{term}: {first:.3f} to {last:.3f}"


@pytest.mark.parametrize("shard", [1, 2])
@pytest.mark.parametrize("options", [(DINO, SERE), (IBOT, SereOptions(no_overlap="skip"))], ids=["dino", "ibot-skip"])
def test_two_processes_train_like_one(options, shard, tmp_path):
    """BatchNorm has the statistics of both; pairs that overlap are counted over both."""
    single = train_tiny(tiny_run(tmp_path, options=options), STEPS)
    parallel = {"precision": "fp32", "shard": shard}
    run = tiny_run(tmp_path, options=options, parallel=parallel, data={"batch_per_rank": 4})
    first, second = on_processes(2, train_tiny, run, STEPS)
    assert_equal_runs(single, first)
    assert largest_difference(first["teacher"], second["teacher"]) == 0


def normalize_on_a_rank(rows: list[Tensor]) -> list:
    """Output, gradients and running statistics of one rank's rows, as numpy arrays."""
    with processes(Parallel()) as mesh:
        norm, x = nn.BatchNorm1d(5).double(), rows[mesh.rank].clone().requires_grad_()
        synchronize_batch_norm(nn.Sequential(norm), mesh)
        y = norm(x)
        (y.sin() * (mesh.rank + 1)).sum().backward()
        return [t.detach().numpy() for t in (y, x.grad, norm.weight.grad, norm.running_mean, norm.running_var)]


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_batch_norm_on_two_cpu_processes_is_that_of_all_rows(shape):
    """Also with unequal numbers of rows."""
    rows = [3 + 2 * torch.randn(count, *shape, dtype=torch.float64) for count in (4, 7)]
    ranks = [[torch.from_numpy(a) for a in rank] for rank in on_processes(2, normalize_on_a_rank, rows)]
    norm, x = nn.BatchNorm1d(5).double(), torch.cat(rows).requires_grad_()
    y = norm(x)
    weight = torch.cat([torch.ones(4), 2 * torch.ones(7)]).view(-1, *[1] * len(shape))
    (y.sin() * weight).sum().backward()
    torch.testing.assert_close(torch.cat([ranks[0][0], ranks[1][0]]), y)
    torch.testing.assert_close(torch.cat([ranks[0][1], ranks[1][1]]), x.grad)
    torch.testing.assert_close(ranks[0][2] + ranks[1][2], norm.weight.grad)
    for rank in ranks:
        torch.testing.assert_close(rank[3], norm.running_mean)
        torch.testing.assert_close(rank[4], norm.running_var)


@pytest.mark.parametrize(
    ("backbone", "host"),
    [("ViT", MOCO), ("ViT", MOBY), ("Swin", DINO), ("Swin", IBOT), ("ResNet", DINO), ("ResNet", MOCO)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__.removesuffix("Options"),
)
def test_other_hosts_and_backbones_train(backbone, host, tmp_path):
    """Other hosts, other backbones with other grids: both terms are there, and all weights of SERE change."""
    model = BACKBONES[backbone]
    summary = "cls" if backbone == "ViT" else "mean"
    crops = dino_policy(2, model.image_size, 2 * model.patch_size)
    run = Run(
        replace(model, summary=summary, drop_path=0.0),
        Objectives((host, SERE), weights={"sere/channel": 0.5}),
        Data(loader="procedural", crops=crops, batch_per_rank=8, workers=0),
        Optim(warmup_epochs=0, clip=0),
        Schedule(epochs=1, steps_per_epoch=4),
        Parallel(precision="fp32"),
        Output(folder=str(tmp_path)),
    )
    metrics = MetricsInMemory()
    trainer = build_trainer(run, loader=PictureLoader(crops, batches=1), metrics=metrics)
    before = {name: parameter.detach().clone() for name, parameter in trainer.student.named_parameters()}
    for _ in range(2):
        trainer.step()
    for step in metrics.steps:
        assert not step["step/refused"]
        assert 0 < step["sere/spatial"] < 4
        assert 0 < step["sere/channel"] < 5
    sere_parameters = {name: p for name, p in trainer.student.named_parameters() if ".sere." in name}
    assert (
        len(sere_parameters) == 2 * 2 * 5
    )  # two norms and a matrix, for space and channels, of global and of local crops
    assert not [name for name, parameter in sere_parameters.items() if torch.equal(parameter, before[name])]


def test_features_before_the_norm_are_computed_only_for_sere():
    for options in ((DINO,), (DINO, SERE)):
        objectives = build_objectives(tiny_run("", options=options))
        student, _ = build_branches(tiny_run("").model, objectives.objectives())
        views = PictureLoader(dino_policy(2, 16, 12), batches=1).batches[0]
        features = student(views, wanted=objectives.student_wants)
        for crops in (features.global_crops, features.local_crops):
            if SERE not in options:
                assert crops.residual is None
                continue
            assert crops.residual.shape == crops.patches.shape
            torch.testing.assert_close(student.backbone.norm(crops.residual), crops.patches)


def test_without_local_crops_there_are_no_local_heads():
    for local, wanted in ((2, True), (0, False)):
        run = tiny_run("", options=(DINO, SERE), data={"loader": "procedural", "crops": dino_policy(local, 16, 12)})
        student, teacher = build_branches(run.model, build_objectives(run).objectives())
        assert any("local_head" in name for name, _ in student.named_parameters()) == wanted
        assert not any("predictor" in name for name, _ in teacher.named_parameters())


def test_what_cannot_work_is_refused_at_build():
    one_crop = CropPolicy((CropSpec(1, 16, (0.4, 1.0)),), dino_policy(2, 16, 12).local_crops)
    run = tiny_run("", options=(DINO, SERE), data={"loader": "procedural", "crops": one_crop})
    with pytest.raises(ValueError, match="sere needs 2 global crops, got 1; add"):
        build_objectives(run)
    wrong = build_objectives(tiny_run("", options=(DinoOptions(), SereOptions(heads=3))))
    sizes = {"width": 20, "depth": 1, "heads": 2}
    with pytest.raises(ValueError, match="must divide the backbone's width, got 3 and 20; set"):
        build_branches(Model(image_size=16, patch_size=4, sizes=sizes), wrong.objectives())
