"""An objective holds parameters, buffers and options, nothing else; all that a step changes is in buffers."""

from __future__ import annotations

import dataclasses

import pytest
from engine.tiny_run import DINO, IBOT, MOBY, MOCO, PQCL, SELFPATCH, SERE, tiny_run, tiny_trainer

from patchlight_kernels import force

RUNS = {
    "dino+selfpatch": (DINO, SELFPATCH),
    "ibot+pqcl": (IBOT, PQCL),
    "moco_v3+sere": (MOCO, SERE),
    "moby": (MOBY,),
}


def attributes(objectives) -> dict[str, object]:
    """All attributes of the objectives and their parts, except parameters, buffers and modules."""
    return {
        f"{path}.{name}": value
        for path, module in objectives.named_modules()
        for name, value in vars(module).items()
        if path and not name.startswith("_")
    }


def is_fixed(value: object) -> bool:
    frozen = dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen
    plain = value if isinstance(value, tuple) else (value,)
    return frozen or all(item is None or isinstance(item, str | int | float) for item in plain)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_step_changes_nothing_but_buffers(options, tmp_path):
    trainer = tiny_trainer(tiny_run(tmp_path, options=options, parallel={"precision": "fp32", "accumulate": 2}))
    before = attributes(trainer.objectives)
    with force(neighbor_topk="reference"):
        trainer.step()
    after = attributes(trainer.objectives)
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert is_fixed(value), f"{name} is a {type(value).__name__}"
        assert value is before[name], f"{name} was {before[name]} and is {value}"
