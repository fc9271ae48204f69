"""The papers' ablations in whole runs: each is an option of a recipe, trains, and needs no number from the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine.tape import OperationStream, TapeRecorder
from engine.test_parallel import STEPS, assert_equal_runs
from engine.tiny_run import (
    DINO,
    IBOT,
    PQCL,
    SELFPATCH,
    SERE,
    NoiseLoader,
    assert_a_resumed_run_is_the_whole,
    largest_difference,
    on_processes,
    outcome,
    tiny_run,
    tiny_trainer,
    train_tiny,
)

from patchlight.data.policy import dino_policy
from patchlight.engine.assembly import build_branches, build_objectives, build_trainer
from patchlight.engine.branches import check_teacher_student
from patchlight.engine.optim import prototype_names
from patchlight.recipes.command import parse
from patchlight.recipes.compatibility import BACKBONES
from patchlight.run import Data, Objectives, Optim, Output, Parallel, Run, Schedule
from patchlight_kernels import force

WITH_PATCHES = replace(DINO, patches=True, patch_points=3)
SEMI = replace(IBOT, heads="semi")
PARTLY = replace(PQCL, query_mask_ratio=0.5)
BATCH_RELATION = replace(SERE, channel="batch")
ALL = (WITH_PATCHES, SEMI, PARTLY, BATCH_RELATION)
TRAINED = {
    "DINO with patches": (WITH_PATCHES,),
    "semi": (SEMI, replace(PQCL, heads="semi")),
    "vanilla": (replace(IBOT, heads="vanilla"), replace(PQCL, heads="vanilla")),
    "joint": (IBOT, replace(PQCL, query_keys="joint")),
    "partly masked": (IBOT, PARTLY),
    "batch relation": (DINO, BATCH_RELATION),
    "all together": ALL,
}


@pytest.mark.parametrize(
    ("options", "precision"),
    [*((options, "fp32") for options in TRAINED.values()), (ALL, "bf16")],
    ids=[*TRAINED, "bf16"],
)
def test_an_ablation_trains_and_its_steps_are_the_same_operations(options, precision, tmp_path):
    """So that a step can be one CUDA graph."""
    trainer = tiny_trainer(tiny_run(tmp_path, options=options, parallel={"precision": precision}))
    before = {name: parameter.detach().clone() for name, parameter in trainer.student.named_parameters()}
    streams = []
    for _ in range(4):
        views = [next(trainer.loader)]
        trainer.step_values.write(trainer.clock)
        with OperationStream() as stream:
            terms = trainer.device_step(views)
        trainer.clock = trainer.clock.next(trainer.global_batch)
        streams.append(stream.operations)
        assert all(value.isfinite() for value in terms.values()), terms
    assert streams[1] == streams[2] == streams[3]
    stay = trainer.update.frozen_first | {"backbone.mask_token"}  # prototypes in the first epoch; a token that few use
    changed = {n for n, p in trainer.student.named_parameters() if not torch.equal(p, before[n])}
    assert changed - stay == {n for n, p in trainer.student.named_parameters() if p.requires_grad} - stay


def test_a_recorded_step_is_that_of_python(tmp_path):
    """All together, on a tape in place of a CUDA graph, which refuses what waits for the device."""
    results = []
    for recorder in (None, TapeRecorder()):
        trainer = tiny_trainer(tiny_run(tmp_path, options=ALL), recorder=recorder)
        for _ in range(6):
            trainer.step()
        results.append(outcome(trainer))
    assert trainer.repeated_step.recorded
    assert results[0]["terms"] == results[1]["terms"]
    for part in ("student", "teacher", "objectives"):
        assert largest_difference(results[0][part], results[1][part]) == 0, part


def without_key_biases(result: dict) -> dict:
    """A key's bias changes no attention: its gradient is rounding alone, of which Adam makes steps."""
    for branch in ("student", "teacher"):
        for name, values in result[branch].items():
            if name.endswith("qkv.bias"):
                values[len(values) // 3 : 2 * len(values) // 3] = 0
    return result


@pytest.mark.parametrize("shard", [1, 2])
def test_two_processes_train_like_one(shard, tmp_path):
    single = train_tiny(tiny_run(tmp_path, options=ALL), STEPS)
    parallel = {"precision": "fp32", "shard": shard}
    run = tiny_run(tmp_path, options=ALL, parallel=parallel, data={"batch_per_rank": 4})
    first, second = on_processes(2, train_tiny, run, STEPS)
    assert largest_difference(first["teacher"], second["teacher"]) == 0
    assert_equal_runs(without_key_biases(single), without_key_biases(first))


def test_a_resumed_run_is_the_whole_run(tmp_path):
    """Drawn masks of queries, the student's own prototypes and the centers of patches included."""
    parts = {"options": ALL, "schedule": {"epochs": 2, "steps_per_epoch": 4}}
    assert_a_resumed_run_is_the_whole(tmp_path, 3, **parts)


def test_the_teacher_of_semi_shared_heads_has_no_prototypes_for_patches(tmp_path):
    """It follows the student's prototypes for the class token; those for patches are the student's alone."""
    run = tiny_run(tmp_path, options=(SEMI,))
    student, teacher = build_branches(run.model, build_objectives(run).objectives())
    check_teacher_student(teacher, student)
    names = {name for name, _ in teacher.named_parameters()} ^ {name for name, _ in student.named_parameters()}
    assert names == {"predictors.ibot.weight_g", "predictors.ibot.weight_v"}
    assert names < prototype_names(student), "they are frozen in the first epochs like the others"
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    old = teacher.heads["ibot"].prototypes.weight_v.clone()
    teacher.follow(student, 0.75)
    wanted = 0.75 * old + 0.25 * student.heads["ibot"].prototypes.weight_v
    torch.testing.assert_close(teacher.heads["ibot"].prototypes.weight_v, wanted.detach())


@pytest.mark.parametrize("part", ["cue", "forward"])
def test_they_are_traced_whole(part, tmp_path):
    """All at once, as the engine compiles them."""
    torch._dynamo.reset()
    terms = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = tiny_trainer(tiny_run(tmp_path, options=ALL))
        if compiled:
            whole = torch.compile(getattr(trainer.objectives, part), fullgraph=True, backend="eager")
            setattr(trainer.objectives, part, whole)
        trainer.step()
        terms.append(trainer.metrics.steps[-1])
    torch._dynamo.reset()
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backbone", ["Swin", "ResNet"])
def test_sere_and_its_comparisons_on_other_backbones(backbone, tmp_path):
    """Without a class token (SERE, Table 16); the heads are the backbone's."""
    model = replace(BACKBONES[backbone], summary="mean", drop_path=0.0)
    crops = dino_policy(0, model.image_size)
    run = Run(
        model,
        Objectives((WITH_PATCHES, BATCH_RELATION)),
        Data(loader="procedural", crops=crops, batch_per_rank=4, workers=0),
        Optim(warmup_epochs=0),
        Schedule(epochs=1, steps_per_epoch=4),
        Parallel(precision="fp32"),
        Output(folder=str(tmp_path)),
    )
    trainer = build_trainer(run, loader=NoiseLoader(run))
    for _ in range(2):
        trainer.step()
    student = trainer.student.heads["sere"].spatial[0].num_features
    assert student == trainer.student.backbone.width


SELFPATCH_ROWS = {
    "3x3, k = 4": {},
    "5x5": {"radius": 2},
    "all patches": {"radius": None},
    "k = 1": {"k": 1},
    "k = 2": {"k": 2},
    "k = 8": {"k": 8},
    "no aggregation": {"pool": "mean"},
}


@pytest.mark.parametrize("rule", SELFPATCH_ROWS.values(), ids=SELFPATCH_ROWS)
@pytest.mark.parametrize("recipe", ["selfpatch_vitti16_coco", "pass_vitti16_coco"])
def test_rows_of_selfpatch_and_pass_are_flags(recipe, rule, tmp_path):
    """SelfPatch, Table 4, and PASS, Table 3: the run builds, with the rule in the teacher."""
    words = [f"--objectives.options.1.neighbors.{name}={str(value).lower()}" for name, value in rule.items()]
    run = parse([recipe, f"--data.path={tmp_path}", *words])
    objectives = build_objectives(run, 2)
    assert objectives.teacher_wants.neighbors == replace(SELFPATCH.neighbors, **rule)
    assert run.model.summary == "class_attention"


@pytest.mark.parametrize("rule", SELFPATCH_ROWS.values(), ids=SELFPATCH_ROWS)
def test_rows_of_selfpatch_and_pass_train(rule, tmp_path):
    options = (DINO, replace(SELFPATCH, neighbors=replace(SELFPATCH.neighbors, **rule)))
    run = tiny_run(tmp_path, options=options, model={"summary": "class_attention"})
    run = replace(run, objectives=replace(run.objectives, weights={"selfpatch/patch": 0.1}))
    trainer = tiny_trainer(run)
    with force(neighbor_topk="reference"):
        trainer.step()
    assert trainer.metrics.steps[-1]["selfpatch/patch"] > 0


FLAGS = {
    "Table 6": ("selfpatch_vitti16_coco", "--objectives.weights.selfpatch/patch 0"),
    "Fig. 4": (
        "pqcl_vits16_in1k_ablation",
        "--objectives.options.1.query-keys joint --data.crops.query-crops.0.size 224",
    ),
    "Fig. 5": ("pqcl_vits16_in1k_ablation", "--objectives.options.1.query-mask-ratio 0.25"),
    "Table 7": ("pqcl_vits16_in1k_ablation", "--objectives.options.0.heads semi --objectives.options.1.heads semi"),
    "Table 10": ("sere_vits16_ins300", "--objectives.options.0.patches"),
    "Table 11": ("sere_vits16_ins300", "--objectives.options.1.channel batch --objectives.weights.sere/spatial 0"),
}


@pytest.mark.parametrize(("recipe", "flags"), FLAGS.values(), ids=FLAGS)
def test_the_other_rows_are_flags(recipe, flags, tmp_path):
    run = parse([recipe, f"--data.path={tmp_path}", *flags.split()])
    assert run != parse([recipe, f"--data.path={tmp_path}"])
    objectives = build_objectives(run, 8)
    with torch.device("meta"):
        build_branches(run.model, objectives.objectives())
