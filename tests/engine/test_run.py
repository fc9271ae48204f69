"""Invalid settings are refused, and every setting is documented."""

import ast
import inspect
import json
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest

from patchlight import run as run_module
from patchlight.data.policy import dino_policy
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.ibot import IbotOptions
from patchlight.objectives.moby import MobyOptions
from patchlight.objectives.moco_v3 import MocoV3Options
from patchlight.objectives.pqcl import PqclOptions
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.objectives.selfpatch_contrast import SelfPatchContrastOptions
from patchlight.objectives.sere import SereOptions
from patchlight.recipes import RECIPES
from patchlight.records import NeighborRule
from patchlight.run import Data, Model, Objectives, Optim, Output, Parallel, Run, Schedule
from patchlight.usage import texts_of

PARTS = (Model, Objectives, Data, Optim, Schedule, Parallel, Output, Run)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (lambda: Model(summary="max"), r"Model.summary must be one of cls, class_attention, mean, got 'max'; pick"),
        (lambda: Model(image_size=100), r"image_size must be a multiple of patch_size, got 100 and 16; change"),
        (lambda: Objectives(options=()), r"at least one objective, got none; add"),
        (lambda: Objectives(options=(DinoOptions(), DinoOptions())), r"each objective once, got \['DinoOptions', "),
        (
            lambda: Objectives(weights={"dino/cls": -1.0}),
            r"Objectives.weights\['dino/cls'\] must be a number in \[0, 2\^53\), got -1.0; use 0 to",
        ),
        (
            lambda: Data(loader="torchvision").check_path(),
            r"Data.path must be .*got path='' with loader='torchvision'; set",
        ),
        (lambda: Data(path="source=MyImages").check_path(), r"passed to train as source.*got .*source=MyImages; call"),
        (lambda: Data(path="x", loader="procedural"), r"got path='x' with loader='procedural'"),
        (lambda: Data(loader="ffcv", path="x"), r"Data.loader must be one of auto, dali, torchvision, procedural"),
        (lambda: Data(path="x", photometric="dali"), r"needs the dali loader, got loader='auto'"),
        (lambda: Data(path="x", most_bad=2), r"Data.most_bad must be a number in \[0, 1\], got 2; the default"),
        (
            lambda: Data(loader="procedural", batch_per_rank=0),
            r"batch_per_rank must be a whole number in \[1, .* got 0",
        ),
        (lambda: Data(batch_per_rank=True), r"batch_per_rank must be a whole number .* got True"),
        (lambda: Data(batch_per_rank=2.0), r"batch_per_rank must be a whole number .* got 2.0"),
        (lambda: Data(workers="8"), r"workers must be a whole number .* got '8'"),
        (lambda: Data(timeout=float("inf")), r"timeout must be a number .* got inf"),
        (lambda: Data(most_pixels=2**40), r"most_pixels must be a whole number in \[1, 178956970\], got 1099511627776"),
        (lambda: Data(procedural_images=10**20), r"procedural_images must be a whole number .* got 1000"),
        (lambda: Optim(name="sdg"), r"Optim.name must be one of adamw, lars, lamb, sgd, got 'sdg'"),
        (lambda: Optim(base_lr=-1), r"Optim.base_lr must be a number in \[0, 2\^53\), got -1; the default is 0.0005"),
        (
            lambda: Optim(teacher_momentum=1.5),
            r"teacher_momentum must be a number in \[0, 1\], got 1.5; the default is 0.996",
        ),
        (lambda: Schedule(epochs=0), r"Schedule.epochs must be a whole number in \[1, 2\^53\), got 0; the default"),
        (
            lambda: Schedule(steps_per_epoch=0),
            r"steps_per_epoch must be a whole number in \[1, .* got 0; the default is None",
        ),
        (lambda: Parallel(precision="fp8"), r"Parallel.precision must be one of auto, bf16, fp16, fp32, got 'fp8'"),
        (lambda: Parallel(accumulate=0), r"Parallel.accumulate must be a whole number in \[1, 2\^53\), got 0"),
        (lambda: Output(keep=0), r"Output.keep must be a whole number in \[1, 2\^53\), got 0"),
        (lambda: Model(patch_size=0), r"Model.patch_size must be a whole number in \[1, .* got 0"),
        (lambda: Model(drop_path=float("nan")), r"Model.drop_path must be a number in \[0, 1\), got nan"),
        (lambda: Model(sizes={"width": -3}), r"Model.sizes\['width'\] must be a number in \(0, .* got -3"),
        (lambda: Objectives(weights={"dino/cls": float("inf")}), r"weights\['dino/cls'\] must be .* got inf"),
        (lambda: Optim(weight_decay=float("inf")), r"Optim.weight_decay must be .* got inf; the default is 0.04"),
        (lambda: Optim(clip=float("nan")), r"Optim.clip must be .* got nan"),
        (lambda: Optim(betas=(0.9, 1.0)), r"Optim.betas\[1\] must be a number in \[0, 1\), got 1.0"),
        (lambda: Optim(momentum=1.0), r"Optim.momentum must be a number in \[0, 1\), got 1.0"),
        (lambda: Optim(base_lr="fast"), r"Optim.base_lr must be .* got 'fast'"),
        (lambda: Schedule(epochs=2.5), r"Schedule.epochs must be a whole number .* got 2.5"),
        (lambda: Schedule(epochs=10**400), r"Schedule.epochs must be a whole number .* got 1000"),
        (lambda: Parallel(seed=-1), r"Parallel.seed must be a whole number in \[0, .* got -1"),
        (
            lambda: Run(data=Data(loader="procedural", crops=dino_policy(2, 224, 90))),
            r"local_crops must be a multiple of",
        ),
        (lambda: Run(schedule=Schedule(epochs=5)), r"warmup_epochs must not exceed Schedule.epochs, got 10 of 5"),
    ],
)
def test_invalid_settings_are_refused_with_rule_value_and_remedy(part, sentence):
    with pytest.raises(ValueError, match=sentence):
        part()


def test_every_field_has_its_docstring():
    """A string after each field, which is its help text."""
    tree = ast.parse(inspect.getsource(run_module))
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{node.name}.{statement.target.id}"


def test_help_has_the_docstrings():
    assert texts_of(Parallel)["accumulate"].startswith("Batches whose gradients make one optimizer step")


def test_a_run_is_plain_data():
    run = Run()
    plain = run.to_dict()
    assert json.loads(json.dumps(plain))["objectives"]["options"][0]["kind"] == "DinoOptions"
    assert plain.keys() == {field.name for field in fields(Run)}


@pytest.mark.parametrize("part", PARTS)
def test_parts_are_frozen(part):
    assert is_dataclass(part)
    settings = part(loader="procedural") if part is Data else part()
    assert replace(settings) == settings
    with pytest.raises(FrozenInstanceError):
        setattr(settings, fields(part)[0].name, None)


BAD_OPTIONS = [
    (DinoOptions, {"student_temperature": 0.0}),
    (DinoOptions, {"teacher_temperature": -0.1}),
    (DinoOptions, {"center_momentum": 1.1}),
    (DinoOptions, {"layers": 0}),
    (DinoOptions, {"warmup_epochs": -1}),
    (DinoOptions, {"target": "mean"}),
    (IbotOptions, {"patch_teacher_temperature": float("nan")}),
    (IbotOptions, {"patch_center_momentum": float("inf")}),
    (IbotOptions, {"patch_start_epoch": -1}),
    (PqclOptions, {"warmup_by": "image"}),
    (PqclOptions, {"student_temperature": float("inf")}),
    (SelfPatchOptions, {"neighbors": NeighborRule(k=0)}),
    (SelfPatchContrastOptions, {"temperature": float("nan")}),
    (MocoV3Options, {"predictor_layers": 0}),
    (MobyOptions, {"queue": 0.5}),
    (SereOptions, {"student_channel_temperature": 0}),
]


@pytest.mark.parametrize(("kind", "values"), BAD_OPTIONS, ids=lambda value: str(value))
def test_invalid_options_of_an_objective_are_refused_by_name(kind, values):
    (name, value), = values.items()  # fmt: skip
    got = 0 if isinstance(value, NeighborRule) else repr(value)
    named = "NeighborRule.k" if isinstance(value, NeighborRule) else f"{kind.__name__}.{name}"
    with pytest.raises(ValueError, match=rf"{named} must be .*, got {got}; ") as error:
        kind(**values)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(("kind", "name"), [(DinoOptions, "prototypes"), (IbotOptions, "patch_prototypes")])
def test_one_prototype_is_refused_with_the_reason(kind, name):
    """Its loss is 0, and loss / ln K is 0 / 0."""
    with pytest.raises(
        ValueError, match=rf"{name} must be 2 or more, got 1; with one prototype the loss is 0, whatever"
    ):
        kind(**{name: 1})
    assert getattr(kind(**{name: 2}), name) == 2


@pytest.mark.parametrize(
    ("settings", "batch", "sentence"),
    [
        ({"base_lr": 1e-4, "min_lr": 1e-3}, 256, r"rises to its end: .* 256 / 256 = 0.0001, is below Optim.min_lr=0.001;"),
        ({"base_lr": 1e-3, "min_lr": 1e-5}, 1, r"0.001 x 1 / 256 = 3.90625e-06, is below"),
        ({"warmup_start_lr": 0.1}, 256, r"warm-up lowers the learning rate: .* Optim.warmup_start_lr=0.1 .* = 0.0005;"),
        ({"base_lr": 1e3}, 256, r"far above what adamw trains with: its peak is 1000 x 256 / 256 = 1000"),
        ({"name": "lars", "base_lr": 1e3}, 256, r"far above what lars trains with"),
        ({"teacher_momentum": 0.0}, 256, r"The teacher is the student at the start: with Optim.teacher_momentum=0 it is a copy"),
        ({"teacher_momentum_end": 0}, 256, r"The teacher is the student at the end"),
    ],
)  # fmt: skip
def test_rates_that_are_seldom_meant_are_named(settings, batch, sentence):
    doubts = Optim(**settings).doubts(batch)
    assert len(doubts) == 1
    assert re.search(sentence, doubts[0])


def test_no_recipe_has_doubtful_rates():
    for name, recipe in RECIPES.items():
        assert recipe().optim.doubts(1024) == [], name


def test_another_global_batch_on_resuming_is_named_with_its_consequences():
    run = Run(data=Data(loader="procedural", batch_per_rank=64), parallel=Parallel(accumulate=2))
    saved = json.loads(json.dumps(run.to_dict()))
    assert run.batch_change(saved, 4, 4) == ""
    assert replace(run, parallel=Parallel(accumulate=4)).batch_change(saved, 4, 2) == "", "the same global batch"
    change = run.batch_change(saved, 4, 2)
    assert "was 512 on 4 processes and is 256 on 2: the peak learning rate was 0.001 and is 0.0005" in change
    assert "2 times as many steps" in change
    assert "make Data.batch_per_rank x Parallel.accumulate 256." in change
