"""Runs with only reference ops and with only fast ops have the same losses. A forced op never falls back: it raises."""

import pytest
from engine.tiny_run import DINO, IBOT, PQCL, SELFPATCH, SERE, tiny_run, tiny_trainer

from patchlight_kernels import extension, force

METHODS = {"selfpatch": (DINO, SELFPATCH), "sere": (IBOT, SERE), "pqcl": (IBOT, PQCL)}


def curve(options: tuple, implementation: str) -> list[dict[str, float]]:
    with force(implementation):
        trainer = tiny_trainer(tiny_run("", options=options))
        for _ in range(10):
            trainer.step()
    return [{name: term.item() for name, term in step.items()} for step in trainer.metrics.steps]


@pytest.mark.parametrize("method", METHODS)
def test_the_fast_ops_train_as_the_reference(method):
    if reason := extension.missing("cpp"):
        pytest.skip(reason)
    slow, fast = (curve(METHODS[method], implementation) for implementation in ("reference", "cpp"))
    assert len(slow) == 10
    assert slow[0]["loss"] != pytest.approx(slow[-1]["loss"], rel=1e-3), "nothing was learned, so nothing was compared"
    for expected, found in zip(slow, fast, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
