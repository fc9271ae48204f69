"""PQCL in whole runs: it learns on iBOT and on DINO, resumes, and is the same on two processes."""

from dataclasses import replace

import pytest
import torch
from engine.test_parallel import assert_equal_runs
from engine.tiny_run import (
    DINO,
    IBOT,
    PQCL,
    SELFPATCH,
    NoiseLoader,
    assert_a_resumed_run_is_the_whole,
    on_processes,
    tiny_run,
    tiny_trainer,
    train_tiny,
)

from patchlight.data.policy import dino_policy, pqcl_policy
from patchlight.engine.assembly import build_branches, build_objectives, train
from patchlight.engine.branches import check_teacher_student
from patchlight.recipes import RECIPES
from patchlight.recipes.papers import pqcl_vits16_in1k, pqcl_vits16_in1k_ablation
from patchlight.records import Clock, Cues, Wanted, now_at
from patchlight_kernels import force


def now_of(objectives):
    clock = Clock(0, 10, 0, 5)
    return now_at(clock, objectives.schedule(clock))


HOSTS = pytest.mark.parametrize("host", [IBOT, DINO], ids=["ibot", "dino"])
SEMI, VANILLA = replace(PQCL, heads="semi"), replace(PQCL, heads="vanilla")


@HOSTS
@pytest.mark.parametrize("pqcl", [PQCL, SEMI, VANILLA], ids=lambda options: options.heads)
def test_the_query_term_falls(host, pqcl, tmp_path):
    """The teacher has other weights and stays fixed, and the images repeat: the student can learn its output."""
    optim = {"base_lr": 0.1, "warmup_epochs": 0, "teacher_momentum": 1.0, "freeze_prototypes_epochs": 0}
    sharp = replace(pqcl, student_temperature=0.1, teacher_temperature=0.1, center_momentum=1.0)
    trainer = tiny_trainer(tiny_run(tmp_path, options=(host, sharp), optim=optim))
    with torch.no_grad():
        for parameter in trainer.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(20):
        trainer.loader.samples = 0
        trainer.step()
    losses = [step["pqcl/query"].item() for step in trainer.metrics.steps]
    assert losses[0] > losses[5] > losses[-1], losses
    assert losses[-1] < losses[0] - 0.3, losses


def test_ten_steps_and_ten_resumed_are_twenty_bit_for_bit(tmp_path):
    parts = {"options": (IBOT, PQCL), "model": {"drop_path": 0.5}}
    assert_a_resumed_run_is_the_whole(tmp_path, 10, **parts)


@pytest.mark.parametrize(("pqcl", "shard"), [(PQCL, 2), (SEMI, 1)], ids=["shared, sharded", "semi, replicated"])
def test_two_processes_train_like_one(pqcl, shard, tmp_path):
    """Sharded, the host's head is gathered once more in a step."""
    single = train_tiny(tiny_run(tmp_path, options=(IBOT, pqcl)), 6)
    parts = {"parallel": {"precision": "fp32", "shard": shard}, "data": {"batch_per_rank": 4}}
    run = tiny_run(tmp_path, options=(IBOT, pqcl), **parts)
    assert_equal_runs(single, on_processes(2, train_tiny, run, 6)[0])


def built(*options, **parts):
    run = tiny_run("", options=options, **parts)
    objectives = build_objectives(run)
    return (*build_branches(run.model, objectives.objectives()), objectives, next(NoiseLoader(run)))


@HOSTS
def test_which_head_the_queries_use(host):
    for pqcl, student_has, teacher_has in ((PQCL, 0, 0), (SEMI, 1, 0), (VANILLA, 1, 1)):
        student, teacher, objectives, views = built(host, pqcl)
        check_teacher_student(teacher, student)
        name = objectives.parts[0].name
        sides = [branch.sides(branch(views))["pqcl"] for branch in (student, teacher)]
        for branch, side, has in zip((student, teacher), sides, (student_has, teacher_has), strict=True):
            assert ((side.predictor or side.head) is not branch.heads[name]) == has


def test_queries_and_query_crops_have_the_same_features_alone():
    student, teacher, objectives, views = built(IBOT, PQCL)
    cues = objectives.cue(views, (4, 4), now_of(objectives))
    student_features, teacher_features = student(views, cues), teacher(views, wanted=Wanted(query_crops=True))
    for view in range(2):
        queries = replace(cues.queries, positions=cues.queries.positions[view])
        alone = student.backbone(views.global_crops.pixels[view], cues.mask[view], queries=queries)
        torch.testing.assert_close(student_features.global_crops.queries[view], alone.queries)
        alone = teacher.backbone(views.query_crops.pixels[view])
        torch.testing.assert_close(teacher_features.query_crops.patches[view], alone.patches)
    assert student_features.query_crops is None
    assert teacher(views).query_crops is None


def test_queries_pass_the_norm_of_a_class_attention_summary():
    """Beside SelfPatch the backbone has neither class token nor final norm."""
    crops = replace(pqcl_policy(2, 12, global_size=16), local_crops=dino_policy(2, 16, 12).local_crops)
    student, teacher, objectives, views = built(DINO, SELFPATCH, PQCL, data={"crops": crops})
    cues = objectives.cue(views, (4, 4), now_of(objectives))
    queries = replace(cues.queries, positions=cues.queries.positions.flatten(0, 1))
    alone = student.summary.norm(student.backbone(views.global_crops.pixels.flatten(0, 1), queries=queries).queries)
    student_features = student(views, cues)
    torch.testing.assert_close(student_features.global_crops.queries.flatten(0, 1), alone)
    with force(neighbor_topk="reference"):
        teacher_sides = teacher.sides(teacher(views, wanted=objectives.teacher_wants))
    _, terms = objectives(student.sides(student_features), teacher_sides, views, cues, now_of(objectives))
    assert terms.keys() == {"dino/cls", "selfpatch/patch", "pqcl/query"}


def test_other_features_do_not_depend_on_queries():
    student, _, objectives, views = built(IBOT, PQCL)
    cues = objectives.cue(views, (4, 4), now_of(objectives))
    with_queries, alone = student(views, cues), student(views, Cues(cues.mask))
    torch.testing.assert_close(with_queries.global_crops.summary, alone.global_crops.summary, rtol=0, atol=2e-6)
    torch.testing.assert_close(with_queries.global_crops.patches, alone.global_crops.patches, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (lambda: tiny_run("", options=(PQCL,)), "needs iBOT or DINO beside it, got PqclOptions only; add"),
        (
            lambda: tiny_run("", options=(DINO, PQCL), data={"crops": dino_policy(0, 16)}),
            "need query crops, got a crop",
        ),
        (
            lambda: tiny_run("", options=(DINO,), data={"crops": pqcl_policy(1, 8, global_size=16)}),
            "got query crops but no",
        ),
        (
            lambda: tiny_run("", options=(DINO, PQCL), data={"crops": pqcl_policy(1, 20, global_size=16)}),
            "must not be larger than the global crops, got 20 and 16 pixels; shrink",
        ),
        (
            lambda: tiny_run("", options=(DINO, PQCL), model={"positions": "learned"}),
            "got Model.positions='learned'; set",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_built(run, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_objectives(run())


@pytest.mark.parametrize("size", [4, 8, 16])
def test_any_query_size_up_to_the_view_with_the_real_loader(size, tmp_path):
    data = {
        "crops": pqcl_policy(3, size, query_ratio=(0.5, 2.0), global_size=16),
        "batch_per_rank": 4,
        "procedural_images": 16,
    }
    run = tiny_run(
        tmp_path, options=(IBOT, PQCL), data={"loader": "procedural", "workers": 0, **data}, schedule={"epochs": 1}
    )
    train(replace(run, output=replace(run.output, evaluate_every=0)))
    assert (tmp_path / "checkpoints" / "step-00000005" / "teacher.safetensors").exists()


@pytest.mark.parametrize("name", sorted(name for name in RECIPES if name.startswith("pqcl")))
def test_recipes_build(name):
    run = RECIPES[name]()
    assert build_objectives(run).teacher_wants.query_crops
    assert run.data.crops.local_crops == ()
    (query,) = run.data.crops.query_crops
    assert (query.count, query.size, query.scale, query.flip) == (1, 96, (0.05, 0.25), 0.0)


def test_recipes_agree_with_the_tables():
    assert pqcl_vits16_in1k(100).schedule.epochs == 100
    run = pqcl_vits16_in1k_ablation(query_size=32, query_area=0.4, query_count=4, prototypes=4096, heads="vanilla")
    (query,) = run.data.crops.query_crops
    assert (query.count, query.size, query.scale) == (4, 32, (0.05, 0.4))
    objectives = build_objectives(run)
    assert [part.target.center.numel() for part in objectives.objectives()] == [4096, 4096]
    assert run.objectives.options[0].patch_prototypes == 4096
