"""A method is one file: a toy from outside the package trains through train.py, and the docs contain it unchanged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from patchlight.engine.assembly import build_trainer
from patchlight.objectives import OBJECTIVES, DinoOptions, register
from patchlight.recipes.command import parse, recipe_of_file

ROOT = Path(__file__).parent.parent.parent
TOY = ROOT / "tests/objectives/toy_method.py"


@pytest.fixture
def unregistered():
    """Removes what a test registers."""
    known = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(known)


def test_a_method_from_outside_trains_through_train_py(tmp_path):
    command = [
        sys.executable,
        "train.py",
        f"{TOY}:toy",
        "--output.folder",
        str(tmp_path),
        "--objectives.options.0.out",
        "8",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(0 < line["toy/cosine"] < 2 for line in lines)
    kind = json.loads((tmp_path / "run.json").read_text())["objectives"]["options"][0]
    assert kind == {"kind": "ToyOptions", "out": 8, "momentum": 0.9}


@pytest.mark.usefixtures("unregistered")
def test_its_state_is_in_the_checkpoints(tmp_path):
    trainer = build_trainer(parse([f"{TOY}:toy", "--output.folder", str(tmp_path)]))
    trainer.step()
    state = trainer.objectives.state_dict()
    assert list(state) == ["parts.0.mean"]
    assert state["parts.0.mean"].any()


@pytest.mark.usefixtures("unregistered")
def test_what_is_wrong_with_a_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must exist, got .*none.py; check"):
        recipe_of_file(tmp_path / "none.py", "toy")
    with pytest.raises(ValueError, match=r"must have the recipe that is named, got tyo; .*: toy"):
        recipe_of_file(TOY, "tyo")


@pytest.mark.usefixtures("unregistered")
def test_a_second_method_of_a_name_is_refused():
    register(DinoOptions)  # the same again is no second one
    with pytest.raises(
        ValueError, match=r"got DinoOptions of .*test_new_method beside that of patchlight.objectives.dino"
    ):
        register(type("DinoOptions", (DinoOptions,), {"__module__": __name__}))


@pytest.mark.usefixtures("unregistered")
def test_a_class_that_is_defined_again_replaces_itself():
    """As a notebook does when a cell runs again."""
    first, second = (recipe_of_file(TOY, "toy")().objectives.options[0] for _ in range(2))
    assert type(first) is not type(second)
    assert OBJECTIVES["ToyOptions"] is type(second)


def test_the_docs_contain_the_toy_unchanged():
    """Each code block of docs/new_method.md is a part of the file, to the letter."""
    source = TOY.read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/new_method.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert block in source, block
