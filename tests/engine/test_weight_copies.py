"""16-bit copies of weights change nothing but the casts that a step does not make any more."""

import pytest
import torch
from dispatched import dispatched
from engine.tiny_run import DINO, IBOT, SERE, largest_difference, outcome, tiny_run, tiny_trainer

from patchlight.data.policy import dino_policy
from patchlight.engine.precision import DTYPES
from patchlight_kernels import force


def build(folder, options, precision, copies, **output):
    """Without local crops, so that each weight is used once: the gradients of two uses are added in fp32, not in 16 bits."""
    parts = {"data": {"crops": dino_policy(0, 16)}, "parallel": {"precision": precision}}
    run = tiny_run(folder, options=options, **parts, output={"folder": str(folder), **output})
    trainer = tiny_trainer(run)
    if copies:
        trainer.update.keep_copies(DTYPES[precision])
    return trainer


@pytest.mark.parametrize("options", [(DINO,), (IBOT, SERE)], ids=["dino", "ibot+sere"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_are_bit_equal(options, precision, tmp_path):
    results = []
    for copies in (False, True):
        trainer = build(tmp_path, options, precision, copies)
        with force(neighbor_topk="reference"):
            for _ in range(4):
                trainer.step()
        results.append(outcome(trainer))
    assert str(results[0]["terms"]) == str(results[1]["terms"])  # some are NaN: fp16 refuses its first steps
    for part in ("student", "teacher", "objectives"):
        assert largest_difference(results[0][part], results[1][part]) == 0


def test_a_step_casts_fewer_tensors(tmp_path):
    casts = []
    for copies in (False, True):
        trainer = build(tmp_path, (DINO,), "bf16", copies)
        trainer.step()
        views = [next(trainer.loader)]
        casts.append(dispatched(trainer.device_step, views)[1].casts())
    layers = sum(isinstance(m, torch.nn.Linear) for m in trainer.teacher.modules())
    assert casts[0] - casts[1] >= 2 * 2 * layers  # weights and biases of both branches


def test_a_resumed_run_has_the_copies_of_what_it_loaded(tmp_path):
    whole = build(tmp_path / "whole", (DINO,), "bf16", True)
    for _ in range(6):
        whole.step()
    first = build(tmp_path / "parts", (DINO,), "bf16", True)
    for _ in range(3):
        first.step()
    first.save()
    second = build(tmp_path / "parts", (DINO,), "bf16", True, resume=True)
    second.begin()
    for _ in range(3):
        second.step()
    assert largest_difference(outcome(whole)["student"], outcome(second)["student"]) == 0
