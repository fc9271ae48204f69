"""Writes docs/tables.md from the recipes and the papers' numbers: `python tests/house/tables_page.py > docs/tables.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from patchlight.evaluation.paper_numbers import PaperNumbers, all_paper_numbers
from patchlight.recipes import RECIPES
from patchlight.recipes.command import request
from patchlight.run import Run
from patchlight.usage import Group, Words

HEAD = """# Recipes and the papers' tables

Written by `python tests/house/tables_page.py > docs/tables.md` from the recipes and from the file that every evaluation prints
its published numbers from (`ssl/patchlight/evaluation/paper_numbers.toml`); a test compares them.

**Nobody has trained a full recipe with this library yet.** The numbers below are the papers' own, in percent. What is reproduced
so far are single steps of the released code ([how](../README.md#how-it-is-tested-without-a-gpu)). "not yet" says what is missing.
"""

COMMANDS = {
    ("knn", "imagenet"): ("k-NN", "knn --data imagenet"),
    ("linear", "imagenet"): ("Linear probe", "linear --data imagenet"),
    ("davis", "davis2017"): ("Video objects, DAVIS 2017", "davis --data DAVIS"),
    ("segment-fpn", "ade20k"): ("Semantic FPN, ADE20K", "segment fpn --layout ade20k --data ADE20K"),
    ("segment-upernet", "ade20k"): ("UPerNet, ADE20K", "segment upernet --layout ade20k --data ADE20K"),
    ("segment-upernet", "voc2012"): (
        "UPerNet, PASCAL VOC 2012",
        "segment upernet --layout voc2012 --data VOC2012 --steps 20000",
    ),
    ("segment-conv", "imagenet-s"): ("ImageNet-S", "segment conv --layout imagenet-s --data ImageNetS919"),
    ("finetune", "imagenet"): ("Fine-tuning", "finetune --data imagenet"),
    ("finetune-1%", "imagenet"): (
        "Fine-tuning on 1 % of the labels",
        "semi --data imagenet --names 1percent.txt",
    ),
    ("finetune-10%", "imagenet"): (
        "Fine-tuning on 10 % of the labels",
        "semi --data imagenet --names 10percent.txt",
    ),
}
NOTES = {
    (
        "segment-upernet",
        "voc2012",
    ): "The 20,000 steps are the paper's. As they differ from the command's default, which is "
    "for ADE20K, the output calls the numbers not comparable; that line is wrong here.",
    ("segment-fpn", "ade20k"): "The paper does not state the learning rates of this head; ours are UPerNet's.",
    ("knn", "imagenet"): "`imagenet` is a folder with `train/` and `val/`.",
    ("segment-conv", "imagenet-s"): "3500 steps are 100 epochs of ImageNet-S 919; other sizes need `--steps`.",
}

UNKNOWN = "not yet"
PUBLIC = "the paper took published weights; the nearest recipe: "
NEAREST = "not yet; the nearest: "
TEN_CROPS = NEAREST + "`dino_vits16_in1k_300ep --schedule.epochs 800 --data.crops.local-crops.0.count 10`"
# (source, method, backbone, epochs) -> the recipe with its flags, or why there is none.
SELFPATCH_3, SELFPATCH_2 = "SelfPatch paper, Table 3", "SelfPatch paper, Table 2"
README, PQCL_1 = "released README", "PQCL paper, Table 1, no local crops"
PQCL_3, PQCL_5 = "PQCL paper, Table 3", "PQCL paper, Table 5"
SERE_1, SERE_2, SERE_23, SERE_4 = (
    "SERE paper, Table 1",
    "SERE paper, Table 2",
    "SERE paper, Tables 2 and 3",
    "SERE paper, Table 4",
)
SERE_S = "SERE paper, Table 1, val, from pretraining"
SMALL, BASE = "ViT-S/16", "ViT-B/16"
SELFPATCH_ROWS = {
    ("MoCo v3", SMALL, 300): PUBLIC + "moco_v3_vits16_in1k",
    ("MoBY", SMALL, 300): PUBLIC + "moby_vits16_in1k",
    ("DINO", SMALL, 300): PUBLIC + "dino_vits16_in1k_300ep",
    ("DINO + SelfPatch", SMALL, 200): "selfpatch_vits16_in1k",
}
SERE_ROWS = {
    ("DINO", SMALL, 100): NEAREST
    + "`sere_vits16_in1k --objectives.weights.sere/spatial 0 --objectives.weights.sere/channel 0`",
    ("DINO + SERE", SMALL, 100): "sere_vits16_in1k",
    ("iBOT", SMALL, 100): NEAREST + "`ibot_vits16_in1k --schedule.epochs 100`",
    ("iBOT", SMALL, 800): "ibot_vits16_in1k",
    ("iBOT + SERE", SMALL, 100): "sere_ibot_vits16_in1k",
    ("iBOT + SERE", BASE, 100): "sere_ibot_vitb16_in1k",
}
PQCL_ROWS = {
    ("DINO", SMALL, 100): NEAREST + "`dino_vits16_in1k --data.crops.local-crops none`",
    ("DINO", SMALL, 300): NEAREST + "`dino_vits16_in1k_300ep --data.crops.local-crops none`",
    ("iBOT", SMALL, 100): NEAREST + "`ibot_vits16_in1k --schedule.epochs 100 --data.crops.local-crops none`",
    ("iBOT", SMALL, 200): NEAREST + "`ibot_vits16_in1k --schedule.epochs 200 --data.crops.local-crops none`",
    ("iBOT", SMALL, None): "not yet: the table names no epochs",
    ("DINO", SMALL, 800): TEN_CROPS,
    ("SelfPatch", SMALL, 200): "selfpatch_vits16_in1k",
    ("PQCL-iBOT", SMALL, 100): "pqcl_vits16_in1k --schedule.epochs 100",
    ("PQCL-iBOT", SMALL, 200): "pqcl_vits16_in1k --schedule.epochs 200",
    ("PQCL-iBOT", SMALL, 800): "pqcl_vits16_in1k",
    ("PQCL-iBOT", SMALL, None): "pqcl_vits16_in1k",
    ("PQCL-iBOT", BASE, 400): "pqcl_vitb16_in1k",
    ("PQCL-DINO", SMALL, None): "pqcl_dino_vits16_in1k",
}
README_ROWS = {
    ("DINO", SMALL, 100): "dino_vits16_in1k",
    ("DINO", SMALL, 800): TEN_CROPS,
    ("iBOT", SMALL, 800): "ibot_vits16_in1k",
}
BY_SOURCE = {
    README: README_ROWS,
    **dict.fromkeys((SELFPATCH_2, SELFPATCH_3), SELFPATCH_ROWS),
    **dict.fromkeys((PQCL_1, PQCL_3, PQCL_5), PQCL_ROWS),
    **dict.fromkeys((SERE_1, SERE_2, SERE_23, SERE_4, SERE_S), SERE_ROWS),
}

METHODS = {  # the kinds of a run's objectives: how the papers call them together
    ("DinoOptions",): {"DINO"},
    ("IbotOptions",): {"iBOT"},
    ("MocoV3Options",): {"MoCo v3"},
    ("MobyOptions",): {"MoBY"},
    ("DinoOptions", "SelfPatchOptions"): {"DINO + SelfPatch", "SelfPatch"},
    ("DinoOptions", "SereOptions"): {"DINO + SERE"},
    ("IbotOptions", "SereOptions"): {"iBOT + SERE"},
    ("DinoOptions", "PqclOptions"): {"PQCL-DINO"},
    ("IbotOptions", "PqclOptions"): {"PQCL-iBOT"},
}
BACKBONES = {"vit_tiny": "ViT-Ti", "vit_small": "ViT-S", "vit_base": "ViT-B"}

NOT_YET = {  # of the papers: what is missing
    "SelfPatch Table 1, PASS Table 1, PQCL Table 2, SERE Table 2: COCO detection and masks": "no evaluation command",
    "SelfPatch Tables 4 to 6, PASS Table 3 (ablations on COCO)": "the numbers; recipes are below",
    "PQCL Tables 4, 6, 7, Figures 3 and 4 (ablations)": "the numbers; the recipe is `pqcl_vits16_in1k_ablation`",
    "PQCL Figure 5: query crops that are partly visible": "no setting",
    "SERE Table 1: ImageNet-S, test set and after fine-tuning": "test predictions and fine-tuned networks are not saved",
    "SERE Table 3 (a), ViT-B for 200 epochs": "the numbers; the recipe is `sere_ibot_vitb16_in1k_200ep`",
    "SERE Table 5: transfer to other data sets": "only the general `finetune`; no settings per data set, no reader for CIFAR",
    "SERE Table 7 and 8, 12 to 15 (ablations on ImageNet-S300)": "the numbers; recipes are below",
    "SERE Table 9: how well attention finds objects": "no evaluation command",
    "SERE Table 10, DINO with unmasked patch clustering; Table 11, relations of a batch": "no setting",
    "SERE Table 16, and all rows of ResNet-50": "no recipe; linear probe and segmentation take ViTs only",
}


def recipe_of(row: PaperNumbers) -> str:
    """The recipe of a row with its flags, or why there is none."""
    return BY_SOURCE.get(row.source, {}).get((row.method, row.backbone, row.epochs), UNKNOWN)


def run_of(recipe: str) -> Run:
    """The run of a recipe with flags, as the command line reads them."""
    asked = request(recipe.split(), "the page of the tables")
    read = Words(Group.of_instance(asked.start), asked.words)
    read.read()
    return Run(**read.group.make(read.given, read.typed))


def described(recipe: str) -> tuple[set[str], str, int]:
    """How the papers call a run: its method, its backbone, its epochs."""
    run = run_of(recipe)
    kinds = tuple(type(options).__name__ for options in run.objectives.options)
    model = run.model
    return METHODS[kinds], f"{BACKBONES[model.arch]}/{model.patch_size}", run.schedule.epochs


def named_recipe(text: str) -> str | None:
    """The recipe that a cell names, None if it names none."""
    return None if text.startswith(UNKNOWN) else text.removeprefix(PUBLIC)


def shown_recipe(text: str) -> str:
    recipe = named_recipe(text)
    return text if recipe is None else text.removesuffix(recipe) + f"`{recipe}`"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def section(task: str, data: str) -> str:
    """The numbers of one evaluation, with the command that makes them."""
    rows = [row for row in all_paper_numbers() if (row.task, row.data) == (task, data)]
    title, command = COMMANDS[task, data]
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    cells = [
        [
            row.source,
            row.method,
            row.backbone,
            str(row.epochs or "not stated"),
            *(f"{row.metrics[name]:.1f}" if name in row.metrics else "" for name in names),
            shown_recipe(recipe_of(row)),
        ]
        for row in rows
    ]
    parts = [f"### {title}\n", f"    patchlight evaluate {command} --checkpoint runs/NAME\n"]
    parts += [f"{note}\n" for key, note in NOTES.items() if key == (task, data)]
    parts.append(table(["source", "method", "backbone", "epochs", *names, "recipe"], cells))
    return "\n".join(parts)


def text_of(recipe) -> str:
    """The docstring of a recipe as one line."""
    return " ".join((inspect.getdoc(recipe) or "").split()).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## By table\n"]
    parts += [section(*key) for key in COMMANDS]
    parts.append("## What has no number or no command here yet\n")
    parts.append(table(["in the papers", "what is missing"], (list(row) for row in NOT_YET.items())))
    parts.append("## By recipe\n\nWhat each recipe says of itself, with the tables and ablations that it is for.\n")
    parts.append(
        table(["recipe", "what"], ([f"`{name}`", text_of(recipe)] for name, recipe in RECIPES.items())).rstrip("\n")
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
