"""What works together is built; all else is refused before anything is built, with the reason."""

from dataclasses import replace

import pytest
import torch
from engine.tiny_run import DINO, IBOT, MOBY, MOCO, SELFPATCH, on_processes, outcome, tiny_run, tiny_trainer, train_tiny

from patchlight.data.policy import dino_policy
from patchlight.engine.assembly import build_branches, build_objectives
from patchlight.records import Wanted
from patchlight.run import Model

SWIN = {
    "arch": "swin_tiny",
    "patch_size": 16,
    "image_size": 32,
    "drop_path": 0.0,
    "summary": "mean",
    "sizes": {"stem_width": 8, "depth": 1, "head_width": 4, "window": 4},
}
RESNET = {
    "arch": "resnet18",
    "patch_size": 32,
    "image_size": 32,
    "drop_path": 0.0,
    "summary": "mean",
    "sizes": {"stem_width": 4},
}
CROPS = {SWIN["arch"]: dino_policy(2, 32, 16), RESNET["arch"]: dino_policy(2, 64, 32)}


def run_on(model: dict, *options, **parts):
    return tiny_run("", options=options, model=model, **{"data": {"crops": CROPS[model["arch"]]}, **parts})


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (
            lambda: run_on(RESNET, IBOT),
            r"ibot needs a backbone that takes masks .* got resnet18; choose from \['swin_b",
        ),
        (lambda: run_on({**SWIN, "summary": "cls"}, DINO), r"has a class token, got swin_tiny; use 'mean' or"),
        (lambda: run_on(SWIN, DINO, SELFPATCH), r"need Model.summary='class_attention', got 'mean'; set it"),
        (
            lambda: tiny_run("", options=(MOCO,), data={"batch_per_rank": 1}),
            r"BatchNorm, which needs 2 .* got 1; raise",
        ),
        (
            lambda: tiny_run("", options=(MOBY,), parallel={"accumulate": 3}),
            r"divides its queue of 32, got 24 \(8 x 1 processes x 3 accumulated\); change",
        ),
        (
            lambda: tiny_run(
                "",
                options=(MOBY,),
                data={"crops": replace(dino_policy(0, 16), global_crops=dino_policy(0, 16).global_crops[:1])},
            ),
            r"moby needs 2 global crops, got 1; add",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(run, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_objectives(run())


def test_the_number_of_processes_counts_in_the_batch():
    run = tiny_run("", options=(MOBY,))
    build_objectives(run, world=4)
    with pytest.raises(ValueError, match=r"got 40 \(8 x 5 processes x 1 accumulated\)"):
        build_objectives(run, world=5)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {**SWIN, "positions": "sincos_rows_first"},
            r"swin_tiny takes .*got {'positions': 'sincos_rows_first'}; leave",
        ),
        ({**RESNET, "freeze_patch_embed": True}, r"needs a patch projection, got resnet18"),
        ({**RESNET, "patch_size": 16}, r"patch_size must be 32, .*got 16"),
        ({**SWIN, "patch_size": 4}, r"patch_size must be a multiple of 8, got 4"),
    ],
)
def test_what_a_backbone_does_not_have_is_refused(model, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_branches(Model(**model), [])


def test_only_a_batch_norm_backbone_takes_views_separately():
    for model, options, separate in ((RESNET, MOCO, True), (RESNET, DINO, False), (SWIN, MOCO, False)):
        run = run_on(model, options)
        student, _ = build_branches(run.model, build_objectives(run).objectives())
        assert student.separate_views is separate


def test_each_view_is_a_batch_of_its_own_to_the_backbone():
    trainer = tiny_trainer(run_on(RESNET, MOCO))
    views = next(trainer.loader)
    features = trainer.teacher(views, wanted=Wanted(local_crops=False)).global_crops
    for view, pixels in enumerate(views.global_crops.pixels):
        alone = trainer.teacher.backbone(pixels).patches
        torch.testing.assert_close(features.patches[view], alone)
    assert trainer.teacher.backbone.bn1.num_batches_tracked == 2 * len(views.global_crops.pixels)


@pytest.mark.parametrize("options", [MOCO, MOBY], ids=["moco", "moby"])
def test_a_resumed_run_continues_bit_for_bit(options, tmp_path):
    """The queue and the momentum's schedule too."""
    whole = train_tiny(tiny_run(tmp_path / "whole", options=(options,)), 7)
    run = tiny_run(tmp_path / "parts", options=(options,))
    train_steps_and_save(run, 4)
    second = tiny_trainer(replace(run, output=replace(run.output, resume=True)))
    second.begin()
    for _ in range(3):
        second.step()
    rest = outcome(second)
    assert rest["terms"] == whole["terms"][4:]
    for part in ("student", "teacher", "objectives"):
        assert all((whole[part][name] == rest[part][name]).all() for name in whole[part])


def train_steps_and_save(run, steps: int) -> None:
    trainer = tiny_trainer(run)
    for _ in range(steps):
        trainer.step()
    trainer.save()


@pytest.mark.parametrize("shard", [1, 2])
def test_all_ranks_have_the_same_queue_with_the_keys_of_all(shard, tmp_path):
    parallel = {"precision": "fp32", "shard": shard, "checkpoint_activations": True}
    run = run_on(SWIN, MOBY, MOCO, parallel=parallel)
    run = replace(run, data=replace(run.data, batch_per_rank=4))
    first, second = on_processes(2, train_tiny, run, 3)
    assert (first["objectives"]["parts.0.queue"] == second["objectives"]["parts.0.queue"]).all()
    assert first["objectives"]["parts.0.oldest"] == 24
    for name in first["teacher"]:
        assert "running" in name or (first["teacher"][name] == second["teacher"][name]).all(), name


def test_a_frozen_patch_projection_keeps_its_initial_weights():
    trainer = tiny_trainer(tiny_run("", options=(MOCO,), model={**tiny_model(), "freeze_patch_embed": True}))
    before = trainer.student.backbone.patch_embed.proj.weight.clone()
    mlp_before = trainer.student.backbone.blocks[0].mlp.fc1.weight.clone()
    for _ in range(2):
        trainer.step()
    for branch in (trainer.student, trainer.teacher):
        assert torch.equal(branch.backbone.patch_embed.proj.weight, before)
    assert not torch.equal(trainer.student.backbone.blocks[0].mlp.fc1.weight, mlp_before)


def tiny_model() -> dict:
    return {"image_size": 16, "patch_size": 4, "drop_path": 0.0, "sizes": {"width": 20, "depth": 2, "heads": 2}}
