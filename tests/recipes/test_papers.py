"""The parts of every recipe work together, for the number of processes that its text names."""

import re

import pytest
import torch

from patchlight.engine.assembly import build_branches, build_objectives
from patchlight.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_for_the_processes_it_names(name):
    run, text = RECIPES[name](), " ".join(RECIPES[name].__doc__.split())
    found = re.search(r"(\d+) (?:processes )?x (\d+)", text)
    world = int(found[1]) if found else 1
    if found:
        assert run.data.batch_per_rank == int(found[2])
    objectives = build_objectives(run, world)
    with torch.device("meta"):
        student, teacher = build_branches(run.model, objectives.objectives())
    assert {n for n, _ in teacher.named_parameters()} <= {n for n, _ in student.named_parameters()}
    product = re.search(r"x \d+ = (\d+)", text)
    if product:
        assert int(product[1]) == world * run.data.batch_per_rank * run.parallel.accumulate


def test_moco_v3_as_in_its_readme():
    run = RECIPES["moco_v3_vits16_in1k"]()
    student, _ = build_branches(run.model, build_objectives(run, 8).objectives())
    assert student.backbone.heads == 12
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    assert "backbone.pos_embed" in dict(student.named_buffers())
    sizes = [tuple(p.shape) for p in student.heads["moco_v3"].parameters() if p.ndim == 2]
    assert sizes == [(4096, 384), (4096, 4096), (256, 4096)]
    sizes = [tuple(p.shape) for p in student.predictors["moco_v3"].parameters() if p.ndim == 2]
    assert sizes == [(4096, 256), (256, 4096)]
