"""Compiled branches: every method's are traced as a whole, once, and train like plain ones."""

import re
from functools import partial, partialmethod

import pytest
import torch
from engine.tiny_run import (
    DINO,
    IBOT,
    MOBY,
    MOCO,
    PQCL,
    SELFPATCH,
    SERE,
    largest_difference,
    on_processes,
    outcome,
    tiny_run,
    tiny_trainer,
    train_tiny,
)
from torch import nn

from patchlight.data.policy import dino_policy
from patchlight.data.procedural import ProceduralSource
from patchlight.engine.branches import Branch
from patchlight.engine.parallel import choose_compiled, processes
from patchlight.engine.probe import TeacherProbe
from patchlight.run import Parallel, Run
from patchlight_kernels import force

STEPS = 3
FP32 = {"precision": "fp32"}
SWIN = {
    "model": {
        "arch": "swin_tiny",
        "summary": "mean",
        "patch_size": 16,
        "image_size": 32,
        "sizes": {"stem_width": 8, "depth": 1, "head_width": 4, "window": 3},
    },
    "data": {"crops": dino_policy(2, 32, 16)},
}
RESNET = {
    "model": {
        "arch": "resnet18",
        "summary": "mean",
        "patch_size": 32,
        "image_size": 64,
        "sizes": {"stem_width": 8},
    },
    "data": {"crops": dino_policy(0, 64)},
}
METHODS = {
    "dino": {"options": (DINO,)},
    "selfpatch": {"options": (DINO, SELFPATCH)},
    "ibot": {"options": (IBOT,)},
    "pqcl": {"options": (IBOT, PQCL)},
    "sere": {"options": (IBOT, SERE)},
    "moco_v3": {"options": (MOCO,)},
    "moby": {"options": (MOBY,)},
    "dino-swin": {"options": (DINO,), **SWIN},
    "moco_v3-resnet": {"options": (MOCO,), **RESNET},
}


@pytest.fixture
def compile_by(monkeypatch):
    """Replaces the backend of compiled modules by one that takes no minute; an incomplete graph is an error."""

    def replace_by(backend: str) -> None:
        compile_whole = partialmethod(nn.Module.compile, backend=backend, fullgraph=True)
        compile_function = partial(torch.compile, backend=backend, fullgraph=True)
        monkeypatch.setattr(torch, "compile", compile_function)
        monkeypatch.setattr(nn.Module, "compile", compile_whole)

    torch._dynamo.reset()
    yield replace_by
    torch._dynamo.reset()


def train_without_recompiling(run: Run) -> dict:
    with force(neighbor_topk="reference"):
        trainer = tiny_trainer(run)
        if run.parallel.precision == "bf16":
            trainer.update.keep_copies(torch.bfloat16)
        compiled = [module for module in trainer.student.modules() if module._compiled_call_impl is not None]
        assert compiled[0] is trainer.student
        assert set(compiled[1:]) == {*trainer.student.heads.values(), *trainer.student.predictors.values()}
        trainer.step()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(STEPS - 1):
                trainer.step()
        return outcome(trainer)


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_branches_and_heads_are_traced_whole_and_once(method, tmp_path, compile_by):
    plain = train_tiny(tiny_run(tmp_path, **METHODS[method]), STEPS)
    compile_by("eager")
    compiled = train_without_recompiling(tiny_run(tmp_path, **METHODS[method], parallel={**FP32, "compile": "on"}))
    assert compiled["terms"] == plain["terms"]
    assert largest_difference(plain["student"], compiled["student"]) == 0
    assert largest_difference(plain["teacher"], compiled["teacher"]) == 0


@pytest.mark.parametrize("method", ["dino", "selfpatch", "ibot", "sere"])
def test_crops_of_all_sizes_together_are_traced_whole_and_once(method, tmp_path, compile_by, monkeypatch):
    """As on a GPU. Rounding differs, as products have other sizes."""
    plain = train_tiny(tiny_run(tmp_path, **METHODS[method]), STEPS)
    compile_by("eager")
    monkeypatch.setattr(Branch, "sizes_together", property(lambda _: True, lambda *_: None), raising=False)
    compiled = train_without_recompiling(tiny_run(tmp_path, **METHODS[method], parallel={**FP32, "compile": "on"}))
    for expected, terms in zip(plain["terms"], compiled["terms"], strict=True):
        assert terms == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("precision", "residual"), [("fp32", "fp32"), ("bf16", "16bit")])
def test_compiled_branches_with_checkpointed_activations_train_like_plain_ones(
    precision, residual, tmp_path, compile_by
):
    model = {"image_size": 16, "patch_size": 4, "drop_path": 0.5, "sizes": {"width": 20, "depth": 2, "heads": 2}}
    parallel = {"precision": precision, "residual": residual, "checkpoint_activations": True}
    plain = train_tiny(tiny_run(tmp_path, model=model, parallel=parallel), STEPS)
    compile_by("aot_eager")
    run = tiny_run(tmp_path, model=model, parallel={**parallel, "compile": "on"})
    compiled = train_without_recompiling(run)
    for expected, terms in zip(plain["terms"], compiled["terms"], strict=True):
        assert terms == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 0.02)


def compiled_units(run: Run) -> list[str]:
    """The names of the student's compiled modules."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    with processes(run.parallel) as mesh:
        modules = tiny_trainer(run, mesh).student.named_modules()
        return [name for name, module in modules if module._compiled_call_impl is not None]


def test_of_several_processes_the_units_are_compiled_but_no_batch_norm(tmp_path):
    blocks = ["backbone.blocks.0", "backbone.blocks.1", "summary"]
    for shard, options, expected in (
        (2, DINO, [*blocks, "heads.dino"]),
        (2, MOCO, blocks),
        (1, DINO, ["", "heads.dino"]),
        (1, MOCO, [""]),
    ):
        parallel = {**FP32, "compile": "on", "shard": shard}
        run = tiny_run(tmp_path, options=(options,), parallel=parallel, data={"batch_per_rank": 4})
        assert on_processes(2, compiled_units, run) == [expected] * 2


@pytest.mark.parametrize(
    ("choice", "recorded", "expected"),
    [("auto", True, True), ("auto", False, False), ("on", False, True), ("off", True, False)],
)
def test_what_is_compiled(choice, recorded, expected):
    compiled, why = choose_compiled(Parallel(compile=choice), recorded)
    assert compiled is expected
    assert ("Parallel.compile" in why) is (choice != "auto")


def test_a_run_says_what_it_does_with_a_step(tmp_path, capsys, compile_by):
    compile_by("eager")
    schedule = {"epochs": 1, "steps_per_epoch": 2}
    run = tiny_run(tmp_path, parallel={**FP32, "compile": "on"}, schedule=schedule)
    tiny_trainer(run).fit()
    printed = capsys.readouterr().out
    assert re.search(r"branches +│ compiled +│ Parallel.compile=\"on\"", printed)
    assert re.search(r"step +│ launched +│ the device is cpu", printed)
    assert printed.count("The first step took") == 1


def test_the_probe_runs_the_teacher_uncompiled(tmp_path, compile_by):
    compile_by("eager")
    run = tiny_run(tmp_path, parallel={**FP32, "compile": "on"})
    trainer = tiny_trainer(run)
    probe = TeacherProbe(run, ProceduralSource(8), trainer.mesh)
    trainer.step()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        probe.evaluate(trainer.teacher, trainer.clock)
        trainer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
