"""Every number of a recipe stands in a paper, in a release, or is ours; paper_values.toml has the place of each."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from patchlight.recipes import RECIPES, ours
from patchlight.recipes.switches import parts_of, with_local_crops
from patchlight.run import Run

BLOCKS = tomllib.loads(Path(__file__).with_name("paper_values.toml").read_text())
ABOUT = {"source", "differs", "like"}
PLACE = r"(SelfPatch|PASS|PQCL|SERE), \S.*|release: (DINO|iBOT|SelfPatch|PQCL|SERE|MoCo v3|MoBY), \S.*|ours(: \S.*)?"
OF_OPTIM = (
    "base_lr",
    "min_lr",
    "name",
    "warmup_epochs",
    "weight_decay",
    "weight_decay_end",
    "clip",
    "teacher_momentum",
)
ALWAYS = (
    "model.arch", "model.patch_size", "model.drop_path", "schedule.epochs", "processes", "images", "peak_lr",
    *(f"optim.{name}" for name in OF_OPTIM), "optim.teacher_momentum_end", "objectives.weights",
)  # fmt: skip
TEMPERATURES = ("student_temperature", "teacher_temperature", "warmup_teacher_temperature", "warmup_epochs")
OF_OBJECTIVE = {
    "dino": ("prototypes", "train_norm", *TEMPERATURES),
    "ibot": ("prototypes", "train_norm", *TEMPERATURES),
    "moco_v3": ("temperature",),
    "moby": ("temperature", "queue"),
    "selfpatch": ("prototypes", *TEMPERATURES[1:], "neighbors.k"),
    "selfpatch_contrast": ("temperature", "neighbors.k"),
    "pqcl": ("heads", *TEMPERATURES),
    "sere": ("heads", "teacher_spatial_temperature", "teacher_channel_temperature", "global_points", "local_points"),
}


def own_values(recipe: str) -> dict:
    return {path: value for block in BLOCKS[recipe] for path, value in block.items() if path not in ABOUT}


def values_of(recipe: str) -> dict:
    """A recipe's values by path: its own, and those of the recipes that it is like which its own leave standing."""
    own, (like,) = own_values(recipe), {block["like"] for block in BLOCKS[recipe] if "like" in block} or {None}

    def replaced(path: str) -> bool:
        return any(f"{path}.".startswith(f"{mine}.") or f"{mine}.".startswith(f"{path}.") for mine in own)

    return {path: value for path, value in values_of(like).items() if not replaced(path)} | own if like else own


def tree_of(run: Run, processes: int) -> dict:
    """A run as nested dictionaries, with what follows from it, and the options of objectives by name."""
    tree = run.to_dict()
    names = [part.name for part in parts_of(run)]
    tree["objectives"] |= dict(zip(names, tree["objectives"]["options"], strict=True))
    images = run.global_batch(processes)
    return tree | {"processes": processes, "images": images, "peak_lr": run.optim.peak_lr(images)}


def at(tree, path: str):
    """The value at a dotted path, as TOML writes it: none is a word, and a tuple a list."""
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list | tuple) else tree[key]
    return plain(tree)


def plain(value):
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return "none" if value is None else value


def named_processes(recipe: str) -> int:
    found = re.search(r"(\d+) (?:processes )?x \d+", " ".join(RECIPES[recipe].__doc__.split()))
    return int(found[1]) if found else 1


def required(run: Run) -> set[str]:
    paths = set(ALWAYS)
    for kind in ("global_crops", "local_crops", "query_crops"):
        specs = getattr(run.data.crops, kind)
        each = {
            f"data.crops.{kind}.{number}.{field}"
            for number in range(len(specs))
            for field in ("count", "size", "scale")
        }
        paths |= each or {f"data.crops.{kind}"}
    for part in parts_of(run):
        paths |= {f"objectives.{part.name}.{field}" for field in OF_OBJECTIVE[part.name]}
        paths |= {"objectives.masks.ratios"} if part.needs().masks else set()
    return paths


def test_the_table_has_every_recipe_and_no_other():
    assert set(BLOCKS) == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_block_names_its_place(recipe):
    for block in BLOCKS[recipe]:
        assert re.fullmatch(PLACE, block.get("source", "")), f"{recipe}: {block.get('source', 'no source')}"
        assert block.get("differs") != "", "say why"
        assert block.keys() - ABOUT, f"{recipe}: {block['source']} names no value"


def drifts(recipe: str, run: Run) -> list[str]:
    """What of a run is not as the table has it."""
    tree, own, names = tree_of(run, named_processes(recipe)), own_values(recipe), {part.name for part in parts_of(run)}
    found = []
    for path, value in values_of(recipe).items():
        objective = path.split(".")[1] if path.startswith("objectives.") else ""
        if objective in OF_OBJECTIVE.keys() - names and path not in own:
            continue  # of an objective of the recipe that this one is like
        expected = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        if (value_here := at(tree, path)) != expected:
            found.append(f"{path} is {value_here}, its place has {value}")
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_numbers_of_its_paper(recipe):
    assert not drifts(recipe, RECIPES[recipe]())


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not hasattr(ours, name)])
def test_what_a_paper_has_is_in_the_table(recipe):
    missing = required(RECIPES[recipe]()) - set(values_of(recipe))
    assert not missing, f"{recipe}: {sorted(missing)}"


def test_a_drift_is_found():
    run = RECIPES["sere_vits16_in1k"]()
    assert drifts("sere_vits16_in1k", replace(run, optim=replace(run.optim, clip=1.0))) == [
        "optim.clip is 1.0, its place has 3.0"
    ]
    assert [text.split()[0] for text in drifts("sere_vits16_in1k", with_local_crops(run, 3))] == [
        "data.crops.local_crops.0.count"
    ]
    run = RECIPES["sere_ibot_vits16_in1k"]()
    options = (run.objectives.options[0], replace(run.objectives.options[1], heads=3))
    changed = replace(run, objectives=replace(run.objectives, options=options, weights={}))
    assert len(drifts("sere_ibot_vits16_in1k", changed)) == 2
    with pytest.raises(KeyError):
        at(tree_of(run, 8), "optim.rate")
    assert values_of("pass_vitti16_coco")["data.crops.local_crops.0.count"] == 2
    assert "data.crops.local_crops.0.count" not in values_of("sere_vits16_ins300"), "replaced by none at all"
