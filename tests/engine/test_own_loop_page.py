"""docs/own_loop.md: its parts are those of the example, and its loop trains as the trainer does."""

import re

import pytest
import torch
from engine.test_pretraining import own_of
from engine.tiny_run import DINO, SELFPATCH, NoiseLoader, tiny_run, tiny_trainer
from parity import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loop.md").read_text(), re.DOTALL)
STEPS, CLOSE = 8, 3e-4


def test_its_parts_are_those_of_the_example():
    source = (ROOT / "examples/own_loop.py").read_text()
    parts = [block for block in BLOCKS if not block.startswith("import")]
    assert len(parts) == 3
    for block in parts:
        assert block in source, block


def test_its_loop_trains_as_the_trainer_does():
    """Rates, decay, clipping and frozen prototypes: the losses of two epochs agree, but for rounding."""
    run = tiny_run(
        "",
        options=(DINO, SELFPATCH),
        optim={"base_lr": 0.03, "warmup_epochs": 1, "teacher_momentum": 0.9, "weight_decay": 2.0},
    )
    trainer = tiny_trainer(run)
    pretraining = own_of(run)
    for name in ("student", "teacher", "objectives"):
        getattr(pretraining, name).load_state_dict(getattr(trainer, name).state_dict())
    start = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    noise, losses = NoiseLoader(run), []

    def recorded(views):
        loss, terms = pretraining(views)
        losses.append(loss.item())
        return loss, terms

    (loop,) = (block for block in BLOCKS if block.startswith("import"))
    loop = loop.replace(
        "base_lr=5e-4, warmup_epochs=10", "base_lr=0.03, warmup_epochs=1, teacher_momentum=0.9, weight_decay=2.0"
    )
    loop = loop.replace("pretraining(views)", "recorded(views)").replace("global_batch=64", "global_batch=8")
    exec(loop, {"pretraining": pretraining, "loader": [next(noise) for _ in range(STEPS)], "recorded": recorded})
    for _ in range(STEPS):
        trainer.step()
    expected = [float(step["loss"]) for step in trainer.metrics.steps]
    assert losses == pytest.approx(expected, rel=1e-4)
    names = dict(trainer.student.named_parameters())
    moved = [name for name, p in names.items() if (p - start[name]).abs().max() > 5 * CLOSE]
    assert len(moved) > len(names) / 2, "nothing was learned, so nothing was compared"
    # Without one of the rules they differ by 1e-3. Some biases have no gradient but rounding, which Adam makes large.
    far = [
        name
        for name, p in pretraining.student.named_parameters()
        if not name.endswith("bias") and not torch.allclose(p, names[name], rtol=0, atol=CLOSE)
    ]
    assert not far
