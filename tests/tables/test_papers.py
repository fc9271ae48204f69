"""Every row of the papers' tables: complete, of the network that its recipe trains, and each command readable by its parser."""

import re

import pytest

from patchlight.evaluation.__main__ import COMMANDS
from patchlight.evaluation.paper_numbers import (
    PAPERS,
    all_paper_numbers,
    all_tables,
    main_numbers,
    paper_numbers,
    tables_named,
)
from patchlight.recipes import RECIPES
from patchlight.recipes.command import parse
from patchlight.tables import small
from patchlight.tables.commands import lines, places, training
from patchlight.usage import values_of

TABLES = {  # of each paper: every table, and the figures that show results
    "SelfPatch": ([1, 2, 3, 4, 5, 6], [1, 3]),
    "PASS": ([1, 2, 3], [1, 4]),
    "PQCL": ([1, 2, 3, 4, 5, 6, 7], [3, 4, 5]),
    "SERE": (list(range(1, 17)), [4, 5, 6]),
}
ROWS = places(list(all_tables()))
TRAININGS = sorted({row.row.train for row in ROWS} - {""})
STEPS = sorted({step for table in all_tables() for measure in table.measures for step in measure.evaluate})
NO_TABLE = {  # recipes that no table of these papers has
    "demo", "debug", "small_data", "selfpatch_vits16_large_batch", "selfpatch_vits16_in1k_released",
    "pqcl_vits16_in1k_released", "moby_swint_in1k", "moco_v3_vitb16_in1k", "moco_v3_resnet50_in1k",
}  # fmt: skip
METHODS = {  # the kinds of a run's objectives: how the tables call them together
    ("DinoOptions",): {"DINO"},
    ("IbotOptions",): {"iBOT", "iBOT, reproduced with fixed positions"},
    ("MocoV3Options",): {"MoCo v3"},
    ("MobyOptions",): {"MoBY"},
    ("DinoOptions", "SelfPatchOptions"): {"DINO + SelfPatch", "DINO + PASS"},
    ("MobyOptions", "SelfPatchOptions"): {"MoBY + SelfPatch"},
    ("MobyOptions", "SelfPatchContrastOptions"): {"MoBY + SelfPatch with negatives"},
    ("DinoOptions", "SereOptions"): {"DINO + SERE"},
    ("IbotOptions", "SereOptions"): {"iBOT + SERE"},
    ("MocoV3Options", "SereOptions"): {"MoCo v3 + SERE"},
    ("DinoOptions", "PqclOptions"): {"DINO + PQCL"},
    ("IbotOptions", "PqclOptions"): {"iBOT + PQCL"},
}
BACKBONES = {
    "vit_tiny": "ViT-Ti/",
    "vit_small": "ViT-S/",
    "vit_base": "ViT-B/",
    "swin_tiny": "Swin-T",
    "resnet50": "ResNet-50",
}


def test_every_table_and_figure_is_there():
    assert set(PAPERS.values()) == {*TABLES, "released"}
    for paper, (tables, figures) in TABLES.items():
        names = [f"Table {n}" for n in tables] + [f"Figure {n}" for n in figures]
        assert list(dict.fromkeys(table.name for table in all_tables() if table.paper == paper)) == names


def test_a_paper_can_be_counted():
    """As many rows, and as many printed numbers, as were counted in the papers by hand."""
    counts = {
        "SelfPatch": (54, 139), "PASS": (34, 111), "PQCL": (110, 236), "SERE": (80, 277), "released": (5, 5)
    }  # fmt: skip
    for paper, (rows, numbers) in counts.items():
        of = [row for row in ROWS if row.table.paper == paper]
        printed = sum(value is not None for row in of for value in row.row.values)
        assert (len(of), printed) == (rows, numbers), paper


@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.title)
def test_a_table_is_complete(table):
    count = sum(len(measure.metrics) for measure in table.measures)
    for row in table.rows:
        assert len(row.values) in (0, count)
        assert len(row.columns) == len(table.columns)
        assert all(value is None or 0 < value < 100 for value in row.values)
        assert row.train or row.network.checkpoint or (row.network.published and row.network.stand_in)
    if not table.title.startswith(("SERE, Table 13", "SERE, Table 14")):  # which print their default twice
        whole = [(row.folder, row.network, row.columns) for row in table.rows]
        assert len(set(whole)) == len(whole)
    for measure in table.measures:
        assert len(measure.names) == len(measure.metrics)
        assert bool(measure.task) == bool(measure.data)


def test_equal_trainings_have_one_folder():
    folders = {(place.row.folder, place.row.train) for place in ROWS if place.row.train}
    assert len({folder for folder, _ in folders}) == len(folders)


@pytest.mark.parametrize("train", TRAININGS)
def test_a_recipe_is_of_its_row(train):
    """Its flags are read; its method, backbone and length are those of the row."""
    networks = {row.row.network for row in ROWS if row.row.train == train}
    run = parse([*train.split(), "--data.path", "images"])
    methods = METHODS[tuple(type(options).__name__ for options in run.objectives.options)]
    for network in networks:
        assert network.method in methods
        assert network.backbone.startswith(BACKBONES[run.model.arch])
        assert not network.backbone.startswith("ViT") or network.backbone.endswith(f"/{run.model.patch_size}")
        assert network.epochs in (0, run.schedule.epochs)
        place = {"_coco": "COCO/train2017", "_ins300": "IMAGENET_S300/train"}
        wanted = next((images for end, images in place.items() if end in train.split()[0]), "IMAGENET/train")
        assert network.images == wanted


@pytest.mark.parametrize("step", STEPS)
def test_an_evaluation_is_read(step):
    first, *words = f"{step} --checkpoint x".split()
    assert values_of(COMMANDS[first], words, "evaluate")["checkpoint"].checkpoint == "x"


@pytest.mark.parametrize("name", small.settings()["data"])
def test_drawn_data_is_read(name, tmp_path):
    _, _, layout, *words = small.rendering(name, tmp_path)
    assert values_of(COMMANDS["render"].functions[layout], words, "render")["out"] == tmp_path / "data" / name


@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.title)
def test_small_runs_are_read(table, tmp_path):
    """The words of a row with those that make it small."""
    for place in places([table]):
        if place.row.train:
            run = parse(small.small_training(place.row, tmp_path)[1:])
            assert (run.schedule.epochs, run.schedule.steps_per_epoch, run.data.batch_per_rank) == (1, 1, 2)
        for _, first, *words in small.small_evaluations(place, tmp_path):
            assert values_of(COMMANDS[first], words, "evaluate")


def test_a_word_too_many_is_not_read():
    with pytest.raises(ValueError, match="got extra"):
        values_of(COMMANDS["knn"], ["--checkpoint", "x", "extra"], "evaluate")


def test_every_recipe_has_a_table():
    used = {train.split()[0] for train in TRAININGS}
    assert used <= set(RECIPES)
    assert set(RECIPES) - used == NO_TABLE


def test_every_evaluation_has_a_table():
    assert {step.split()[0] for step in STEPS} == set(COMMANDS) - {"render"}
    heads = {step.split()[1] for step in STEPS if step.startswith("segment")}
    assert heads == {"conv", "fpn", "upernet"}, "linear is of no table"


def test_commands_can_be_typed():
    for place in ROWS:
        for line in lines(place):
            assert line.startswith(("patchlight train ", "patchlight evaluate ", "# the paper took a published "))
    (first, *_) = [p for p in ROWS if p.table.title == "SERE, Table 1"]
    assert training(first.row)[:4] == ["train", "sere_vits16_in1k", "--without", "sere"]
    tuned = [line for line in lines(first) if line.endswith("--checkpoint runs/sere-baseline-dino-s-finetuned")]
    assert len(tuned) == 1
    assert "--predictions runs/sere-baseline-dino-s-finetuned-predictions " in tuned[0]
    assert sum("finetune" in re.split(r"\s", line) for line in lines(first)) == 1, "it is fine-tuned once"


def test_tables_by_name():
    assert [t.title for t in tables_named("sere 5")] == ["SERE, Table 5"]
    assert [t.title for t in tables_named("SERE, Table 5")] == ["SERE, Table 5"]
    assert [t.title for t in tables_named("PASS 2")] == ["PASS, Table 2 (a)", "PASS, Table 2 (b)"]
    assert [t.title for t in tables_named("PASS Table 2 (b)")] == ["PASS, Table 2 (b)"]
    assert len(tables_named("PQCL")) == 12
    with pytest.raises(ValueError, match=r"A table must be one of the papers', got 'SERE 55'; perhaps SERE 5 "):
        tables_named("SERE 55")


def test_numbers_of_an_evaluation():
    """As read in the papers."""
    found = {(r.method, r.backbone, r.source): r.metrics for r in paper_numbers("detect-cascade", "coco")}
    assert found["DINO + SERE", "ViT-S/16", "SERE, Table 2"] == {
        "box AP": 46.6, "box AP50": 65.9, "box AP75": 50.2, "mask AP": 40.5, "mask AP50": 62.9, "mask AP75": 43.5
    }  # fmt: skip
    sums = {r.method: r.metrics["mIoU"] for r in paper_numbers("segment-conv", "imagenet-s-ft")}
    assert sums == {"DINO": 54.6, "DINO + SERE": 57.3, "iBOT": 62.6, "iBOT + SERE": 63.0}
    assert [r.columns for r in paper_numbers("knn", "imagenet") if r.ablation] == [
        {"K": "4096"}, {"K": "16384"}, {"K": "8192"}
    ]  # fmt: skip
    assert not paper_numbers("davis", "my videos")


def test_what_is_printed_beside_a_result():
    """No ablation; a row of several tables once; networks that a recipe trains first."""
    rows = main_numbers("davis", "davis2017")
    assert len({(r.method, r.backbone, r.epochs) for r in rows}) == len(rows) == 13
    assert [r.trained for r in rows] == sorted((r.trained for r in rows), reverse=True)
    (dino,) = [r for r in rows if r.method == "DINO"]
    assert dino.source == "SelfPatch, Table 3; PASS, Table 2 (b); PQCL, Table 5"
    (tuned,) = [r for r in main_numbers("finetune", "imagenet") if (r.method, r.backbone) == ("DINO", "ViT-S/16")]
    assert (tuned.metrics, tuned.source) == ({"top1": 79.7, "top5": 95.1}, "SERE, Table 1; SERE, Table 6")
    assert all(main_numbers(r.task, r.data) for r in all_paper_numbers() if not r.ablation)
