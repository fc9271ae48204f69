"""Every method is traced whole, without a break: the engine compiles what lies between the branches and the update."""

import copy

import pytest
import torch
from objectives import (
    test_contrast,
    test_dino,
    test_ibot,
    test_pqcl,
    test_relative_positions,
    test_selfpatch,
    test_sere,
)

from patchlight.data.masking import FixedMasks
from patchlight.objectives.geometry import relative_positions
from patchlight.objectives.moby import Moby
from patchlight.objectives.moco_v3 import MocoV3
from patchlight.objectives.selfpatch_contrast import SelfPatchContrast, SelfPatchContrastOptions


def dino():
    objective, *heads = test_dino.build()
    return test_dino, objective, test_dino.sides(*heads)


def ibot():
    objective, *heads = test_ibot.build(masks=FixedMasks())
    return test_ibot, objective, test_ibot.sides(*heads)


def pqcl():
    objective, *heads = test_pqcl.build()
    return test_pqcl, objective, test_pqcl.sides(*heads)


def selfpatch():
    objective, *heads = test_selfpatch.build()
    return test_selfpatch, objective, test_selfpatch.sides(*heads)


def sere():
    objective, *parts = test_sere.build()
    return test_sere, objective, parts


def moco_v3():
    objective, heads = test_contrast.build(MocoV3, test_contrast.MOCO)
    return test_contrast, objective, test_contrast.sides(heads)


def moby():
    objective, heads = test_contrast.build(Moby, test_contrast.MOBY)
    return test_contrast, objective, test_contrast.sides(heads)


def selfpatch_contrast():
    objective, heads = test_contrast.build(SelfPatchContrast, SelfPatchContrastOptions(hidden=10, out=5))
    return test_contrast, objective, test_contrast.patch_sides(heads)


@pytest.mark.parametrize("case", [dino, ibot, pqcl, selfpatch, sere, moco_v3, moby, selfpatch_contrast])
@pytest.mark.parametrize("part", ["cue", "forward"])
def test_a_method_is_traced_whole(case, part):
    torch._dynamo.reset()
    module, objective, sides = case()
    traced = copy.deepcopy(objective)  # as a forward changes its buffers
    setattr(traced, part, torch.compile(getattr(traced, part), fullgraph=True, backend="eager"))
    results = [module.run(o, *sides) for o in (objective, traced)]
    expected, result = (r if isinstance(r, dict) else {"term": r} for r in results)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-12, atol=0)


def test_the_positions_of_queries_are_traced_whole():
    torch._dynamo.reset()
    crops = [test_relative_positions.crops(count) for count in (3, 2)]
    compiled = torch.compile(relative_positions, fullgraph=True, backend="eager")
    for flip_aware in (True, False):
        result, expected = (f(*crops, (2, 3), (4, 5), flip_aware, "center") for f in (compiled, relative_positions))
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
