"""A run with other objectives is the one that a person would write by hand, from the command line and from Python."""

import json
import re
from dataclasses import replace

import pytest
import torch
from engine.tiny_run import MetricsInMemory
from parity import ROOT

from patchlight.command import main
from patchlight.data.masking import MaskRule
from patchlight.data.policy import CropSpec, dino_policy, pqcl_policy, selfpatch_policy
from patchlight.engine.assembly import build_branches, build_objectives, build_trainer
from patchlight.objectives import OBJECTIVES, DinoOptions, IbotOptions, PqclOptions, SelfPatchOptions, SereOptions
from patchlight.recipes import RECIPES, with_local_crops, with_objectives
from patchlight.recipes.command import parse
from patchlight.recipes.switches import parts_of, registered
from patchlight.run import Data, Model, Objectives, Optim, Run, Schedule

TRAINING = (ROOT / "docs/training.md").read_text()
ROWS = {"warmup_teacher_temperature": 0.04, "teacher_temperature": 0.07, "warmup_epochs": 30}
MASKS = MaskRule(ratios=((0.0, 0.0), (0.3, 0.2)))
DINO_SERE = {"dino/cls": 1.0, "sere/spatial": 1.0, "sere/channel": 1.0}
IBOT_SERE = {"ibot/cls": 1.65, "ibot/patch": 1.65, "sere/spatial": 0.2, "sere/channel": 0.5}


def data(crops, batch: int = 64) -> Data:
    return Data(path="x", crops=crops, batch_per_rank=batch)


def low(local: int, low: float):
    return dino_policy(local, global_scale=(low, 1.0), local_scale=(0.05, low))


BY_HAND = {
    "sere_vits16_in1k --without sere": Run(data=data(low(4, 0.35))),
    "sere_vits16_ins300 --without sere": Run(data=data(low(0, 0.35))),
    "sere_ibot_vits16_in1k --without sere": Run(
        objectives=Objectives((IbotOptions(),), masks=MASKS),
        data=data(low(10, 0.4)),
        optim=Optim(clip=0.3, decayed="biases"),
    ),
    "pqcl_vits16_in1k --without pqcl": Run(
        model=Model(positions="sincos"),
        objectives=Objectives((IbotOptions(),), masks=MASKS),
        data=data(low(0, 0.25)),
        schedule=Schedule(epochs=800),
    ),
    "selfpatch_vits16_in1k --without selfpatch": Run(
        objectives=Objectives((DinoOptions(**ROWS),)),
        data=data(selfpatch_policy(8), 128),
        optim=Optim(min_lr=1e-5),
        schedule=Schedule(epochs=200),
    ),
    "dino_vits16_in1k --with sere": Run(
        objectives=Objectives((DinoOptions(), SereOptions()), DINO_SERE), data=data(dino_policy())
    ),
    "dino_vits16_in1k --without dino --with ibot sere": Run(
        objectives=Objectives((IbotOptions(), SereOptions()), IBOT_SERE, MASKS), data=data(dino_policy())
    ),
    "sere_vits16_in1k --with ibot sere --without dino sere": Run(
        objectives=Objectives((IbotOptions(), SereOptions()), IBOT_SERE, MASKS), data=data(low(4, 0.35))
    ),
    "dino_vits16_in1k --with selfpatch": Run(
        model=Model(summary="class_attention"),
        objectives=Objectives((DinoOptions(center_over="all"), SelfPatchOptions()), {"selfpatch/patch": 0.1}),
        data=data(dino_policy()),
    ),
    "dino_vits16_in1k --with selfpatch --data.local-count 0": Run(
        model=Model(summary="class_attention"),
        objectives=Objectives(
            (DinoOptions(), SelfPatchOptions(teacher_sees_local=False)), weights={"selfpatch/patch": 0.1}
        ),
        data=data(dino_policy(0)),
    ),
    "dino_vits16_in1k_two_views --with=pqcl": Run(
        model=Model(positions="sincos"),
        objectives=Objectives((DinoOptions(train_norm=True, **ROWS), PqclOptions())),
        data=data(replace(dino_policy(0, global_scale=(0.14, 1.0)), query_crops=pqcl_policy().query_crops)),
        optim=Optim(min_lr=1e-5, clip=0),
        schedule=Schedule(epochs=300),
    ),
}
SAME = {  # a line, and the recipe that it makes
    "selfpatch_vitti16_coco --without selfpatch": "dino_vitti16_coco",
    "selfpatch_vitti8_coco --without selfpatch": "dino_vitti8_coco",
    "moby_vitti16_coco --with selfpatch": "selfpatch_moby_vitti16_coco",
    "moby_vitti16_coco --with selfpatch_contrast": "selfpatch_moby_vitti16_coco_negatives",
    "moby_swint_coco --with selfpatch_contrast": "selfpatch_moby_swint_coco_negatives",
    "selfpatch_moby_swint_coco_negatives --without selfpatch_contrast": "moby_swint_coco",
    "moco_v3_vits16_ins300 --with sere --objectives.options.1.heads 6": "sere_moco_v3_vits16_ins300",
    "sere_moco_v3_vits16_ins300 --without sere": "moco_v3_vits16_ins300",
    "sere_vits16_in1k --data.local-count 0": "sere_vits16_ins300",
    "sere_vits16_ins300 --data.local-count 4": "sere_vits16_in1k",
    "pass_vits16_in1k --data.local-count 8": "selfpatch_vits16_in1k",
    "pqcl_vits16_in1k --without pqcl --with pqcl": "pqcl_vits16_in1k",
    "sere_ibot_vitb16_in1k --without sere --with sere": "sere_ibot_vitb16_in1k",
    "selfpatch_vits16_in1k --without selfpatch --with selfpatch": "selfpatch_vits16_in1k",
    "ibot_vits16_in1k --without ibot --with ibot": "ibot_vits16_in1k",
}


def parsed(line: str) -> Run:
    return parse([*line.split(), "--data.path", "x"])


@pytest.mark.parametrize("line", BY_HAND)
def test_a_switched_run_is_the_one_written_by_hand(line):
    run = parsed(line)
    for part in vars(run):
        assert getattr(run, part) == getattr(BY_HAND[line], part), part
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize("line", SAME)
def test_a_switched_recipe_is_another_recipe(line):
    expected = RECIPES[SAME[line]]()
    assert parsed(line) == replace(expected, data=replace(expected.data, path="x"))


def test_python_has_the_same_switches():
    run = RECIPES["sere_vits16_in1k"]()
    assert with_objectives(run, "ibot", without=["dino", "sere"]).objectives == Objectives(
        (IbotOptions(),), masks=MASKS
    )
    assert with_local_crops(run, 0).data.crops.local_crops == ()
    assert with_objectives(run) == run


def test_hosts_come_first_and_flags_count_the_new_order():
    run = parsed("sere_vits16_in1k --without dino --with ibot --objectives.options.0.prototypes 512")
    assert [type(options) for options in run.objectives.options] == [IbotOptions, SereOptions]
    assert run.objectives.options[0].prototypes == 512


def test_weights_of_others_keep_their_shares_without_sere():
    """They are divided by that of the host's first term, whatever alpha and beta were."""
    run = parsed(
        "sere_ibot_vits16_in1k --with selfpatch --objectives.weights.ibot/cls 1.8 --objectives.weights.ibot/patch 3.6 "
        "--objectives.weights.selfpatch/patch 0.36"
    )
    assert with_objectives(run, without=["sere"]).objectives.weights == {"ibot/patch": 2.0, "selfpatch/patch": 0.2}
    run = parsed("sere_vits16_ins300 --objectives.weights.dino/cls 0")  # of Table 8
    assert with_objectives(run, without=["sere"]).objectives.weights == {"dino/cls": 0.0}
    run = parsed("selfpatch_vits16_in1k --with sere")
    assert run.objectives.weights == {"selfpatch/patch": 0.1} | DINO_SERE
    assert with_objectives(run, without=["sere"]) == parsed("selfpatch_vits16_in1k")


def test_what_another_objective_needs_stays():
    run = parsed("selfpatch_vits16_in1k --with selfpatch_contrast")
    assert with_objectives(run, without=["selfpatch"]).model.summary == "class_attention"
    run = parsed("pqcl_vits16_in1k --with dino")
    without = with_objectives(run, without=["ibot"])
    assert (without.objectives.masks, without.objectives.mask_counts) == (MaskRule(), "fixed")
    assert without.data.crops.query_crops, "PQCL is still there"


@pytest.mark.parametrize(
    ("line", "size", "scale"),
    [
        ("pqcl_vits16_in1k --data.local-count 2", 96, (0.05, 0.25)),
        ("moby_swint_in1k --data.local_count=1", 96, (0.05, 0.08)),
        ("dino_vits16_in1k --data.local-count 10", 96, (0.05, 0.4)),
    ],
)
def test_local_crops_follow_the_runs_rule_or_dinos(line, size, scale):
    (spec,) = parsed(line).data.crops.local_crops
    assert spec == CropSpec(int(line[-2:].strip("= ")), size, scale)


def test_query_crops_fit_small_images():
    run = with_objectives(RECIPES["demo"](), "pqcl", without=["selfpatch"])
    assert run.data.crops.query_crops[0].size == run.data.crops.local_crops[0].size == 32
    run = with_objectives(with_local_crops(run, 0), "pqcl", without=["pqcl"])
    assert run.data.crops.query_crops[0].size == 24, "48 x 96 / 224, in patches of 8 pixels"


WRONG = [
    ("dino_vits16_in1k --with sera", "--with takes objectives, got sera; perhaps sere is meant"),
    ("dino_vits16_in1k --with byol", "got byol; there are dino, ibot, moco_v3, moby, selfpatch, selfpatch_contrast, pqcl, sere"),
    ("dino_vits16_in1k --with", "--with needs a value, got nothing; write --with sere"),
    ("dino_vits16_in1k --with= --dry-run", "--with needs a value, got nothing"),
    ("dino_vits16_in1k --with dino", "--with takes what a run does not have, got dino; leave it out"),
    ("dino_vits16_in1k --with sere sere", "--with takes what a run does not have, got sere"),
    ("dino_vits16_in1k --without", "--without needs a value, got nothing"),
    ("dino_vits16_in1k --without sere", "--without takes objectives of the run, got sere; it has dino"),
    ("sere_vits16_in1k --without dinno", "got dinno; perhaps dino is meant"),
    ("sere_vits16_in1k --without sere dino", "at least one objective, got --without sere dino; name another one after --with"),
    ("pqcl_vits16_in1k --without ibot", "needs iBOT or DINO beside it, got PqclOptions only; add"),
    ("moco_v3_vits16_in1k --with pqcl", "needs iBOT or DINO beside it, got MocoV3Options, PqclOptions only"),
    ("dino_vits16_in1k --wiht sere", "got --wiht; perhaps --with"),
    ("dino_vits16_in1k --data.local-count", "--data.local-count needs a value, got nothing; write --data.local-count 4"),
    ("dino_vits16_in1k --data.local-count some", "--data.local-count must be a whole number, got some"),
    ("dino_vits16_in1k --data.local-count 2 4", "--data.local-count must be a whole number, got 2 4"),
    ("dino_vits16_in1k --data.local-count --1", "got --1"),
    ("dino_vits16_in1k --data.local-count -1", "--data.local-count must be a whole number in [0, 2^53), got -1"),
    ("pqcl_vits16_in1k --objectives.weights.pqcl/qury 2", "terms are ['ibot/cls', 'ibot/patch', 'pqcl/query']; perhaps"),
    ("sere_vits16_in1k --objectives.weights.ibot/cls 2", "where the terms are ['dino/cls', 'sere/channel', 'sere/spatial']"),
    ("dino_vits16_in1k --objectives.weights.dino/cls -1", "must be a number in [0, 2^53), got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_switch_is_one_sentence(line, expected, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", *line.split()])
    text = capsys.readouterr().err
    assert (end.value.code, text.count("\n")) == (2, 1)
    assert expected in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "moco_v3_resnet50_in1k --without moco_v3 --with dino pqcl",
            "pqcl needs a backbone that .*, got resnet50; choose",
        ),
        ("dino_resnet50_ins300 --without dino --with ibot", "ibot needs a backbone that .*, got resnet50; choose"),
        ("moby_swint_in1k --with pqcl ibot", "pqcl needs a backbone that .*, got swin_tiny; choose"),
    ],
)
def test_what_a_backbone_cannot_is_refused_when_a_run_is_built(line, expected):
    with pytest.raises(ValueError, match=expected):
        build_objectives(parsed(line))


def test_several_rules_of_local_crops_have_their_own_flags():
    run = RECIPES["dino_vits16_in1k"]()
    (spec,) = run.data.crops.local_crops
    two = replace(run, data=replace(run.data, crops=replace(run.data.crops, local_crops=(spec, spec))))
    with pytest.raises(ValueError, match=r"one rule for local crops, got 2 rules; change them by"):
        with_local_crops(two, 4)
    assert with_local_crops(two, 0).data.crops.local_crops == ()


def test_switches_on_top_of_a_file(tmp_path):
    run = parsed("sere_ibot_vits16_in1k")
    (tmp_path / "run.json").write_text(json.dumps(run.to_dict()))
    line = ["--config", str(tmp_path / "run.json"), "--without", "sere", "--data.local-count", "2"]
    assert parse(line) == with_local_crops(with_objectives(run, without=["sere"]), 2)


def test_every_term_of_a_run_has_its_flag():
    for name, recipe in RECIPES.items():
        terms = [term for part in parts_of(recipe()) for term in part.terms]
        flags = [word for term in terms for word in (f"--objectives.weights.{term}", "0.5")]
        images = ["--data.path", "x"] if recipe().data.path else []
        assert parse([name, *flags, *images]).objectives.weights == dict.fromkeys(terms, 0.5)


def test_every_registered_objective_has_a_name_and_names_its_terms():
    """Of its own package; another's may leave its terms open."""
    ours = {name: kind for name, kind in registered().items() if kind.__module__.startswith("patchlight.")}
    assert set(ours) == {"dino", "ibot", "moco_v3", "moby", "selfpatch", "selfpatch_contrast", "pqcl", "sere"}
    assert set(ours.values()) <= set(OBJECTIVES.values())


def test_an_unknown_weight_is_refused_when_a_run_is_built():
    run = RECIPES["dino_vits16_in1k"]()
    with pytest.raises(ValueError, match=r"must name loss terms, got \['dino/clss'\] .*; perhaps dino/cls is meant"):
        build_objectives(replace(run, objectives=replace(run.objectives, weights={"dino/clss": 1.0})))


def test_help_names_the_switches(capsys):
    main(["train", "dino_vits16_in1k", "--with", "sere", "--help-all"])
    printed = capsys.readouterr().out
    assert "--objectives.options.1.teacher-spatial-temperature" in printed, (
        "settings of the run that the words describe"
    )
    assert "--with NAME" in printed
    assert "--data.local-count N" in printed
    assert "selfpatch_contrast, pqcl, sere" in printed


def test_resnet_with_sere_has_groups_that_divide_its_width():
    run = parsed("dino_resnet50_ins300 --with sere")
    objectives = build_objectives(run, 8)
    assert objectives.objectives()[1].heads == 32
    with torch.device("meta"):
        student, _ = build_branches(run.model, objectives.objectives())
    assert student.backbone.width == 2048


LINES = [
    "debug --with sere --optim.name sgd",
    "debug --without selfpatch --with pqcl --data.local-count 0",
    "debug --without dino selfpatch --with ibot sere",
    "debug --without dino --with moby",
]


@pytest.mark.parametrize("line", LINES)
def test_a_switched_run_trains(line, tmp_path):
    run = parse([*line.split(), "--output.folder", str(tmp_path / "run"), "--data.batch-per-rank", "4"])
    metrics = MetricsInMemory()
    trainer = build_trainer(run, metrics=metrics)
    try:
        trainer.step()
    finally:
        trainer.loader.close()
    terms = {term for part in parts_of(run) for term in part.terms}
    assert terms <= metrics.steps[0].keys()
    assert all(metrics.steps[0][term].isfinite() for term in terms)


def test_every_line_of_the_page_about_training_is_a_run():
    """Table 14's factor of the host's loss is that of the release."""
    lines = re.findall(r"^ *patchlight train (\w+_\w+ .*?)(?: *#.*)?$", TRAINING, re.MULTILINE)
    assert len(lines) >= 12
    table_14 = 0
    for line in lines:
        weights = parsed(line).objectives.weights
        if line.startswith("sere_ibot") and "ibot/cls" in line:
            table_14 += 1
            factor = (4 - weights["sere/spatial"] - weights["sere/channel"]) / 2
            assert weights["ibot/cls"] == weights["ibot/patch"] == pytest.approx(factor)
    assert table_14 == 4, "the fifth row is the recipe"
