"""Each failure is produced on purpose, and reported by its name."""

import re
from dataclasses import replace

import pytest
import torch
from engine.tiny_run import DINO, NoiseLoader, tiny_run, tiny_trainer

from patchlight.engine.assembly import train
from patchlight.engine.batch_loss import spread
from patchlight.engine.sentinels import PATIENCE, TrainingError
from patchlight.engine.trainer import Trainer
from patchlight.records import Features

LINES = PATIENCE + 1


def fit(trainer: Trainer) -> list[str]:
    trainer.fit()
    return trainer.metrics.diagnoses


def logging_trainer(folder, **parts) -> Trainer:
    """A log line per step."""
    parts = {"output": {"folder": str(folder), "save_every": 10**6, "log_every": 1}, **parts}
    parts.setdefault("schedule", {"epochs": LINES, "steps_per_epoch": 1})
    fast = {"base_lr": 0.03, "warmup_epochs": 0, "teacher_momentum": 0.9, "freeze_prototypes_epochs": 0}
    parts.setdefault("optim", fast)
    return tiny_trainer(tiny_run(folder, **parts))


def test_a_healthy_run_gets_no_diagnosis(tmp_path):
    assert fit(logging_trainer(tmp_path)) == []


def test_equal_outputs_for_all_images_are_a_uniform_collapse(tmp_path):
    """A student with uniform outputs has the loss ln K, whatever the target."""
    flat = replace(DINO, student_temperature=1e4, teacher_temperature=1e4)
    assert fit(logging_trainer(tmp_path, options=(flat,))) == ["uniform collapse"]


def test_a_short_uniform_start_is_no_collapse(tmp_path):
    flat = replace(DINO, student_temperature=1e4, teacher_temperature=1e4)
    assert (
        fit(logging_trainer(tmp_path, options=(flat,), schedule={"epochs": PATIENCE - 1, "steps_per_epoch": 1})) == []
    )


class EqualImages(NoiseLoader):
    """All crops are equal."""

    def cut(self, ids, specs):
        crops = super().cut(ids, specs)
        return replace(crops, pixels=torch.ones_like(crops.pixels))


def test_features_that_do_not_depend_on_the_image_are_constant(tmp_path):
    trainer = logging_trainer(tmp_path)
    trainer.batches.loader = EqualImages(trainer.run)
    assert "constant features" in fit(trainer)


def test_spread_is_one_for_independent_directions_and_zero_for_one():
    rows = torch.randn(2, 400, 300)
    assert spread(Features(rows, rows, (1, 1))) == pytest.approx(1, abs=0.01)
    assert spread(Features(rows[:, :1].expand(2, 400, 300)[:1], rows, (1, 1))) == pytest.approx(0, abs=1e-3)


def test_a_teacher_with_memory_of_the_student_ends_the_run(tmp_path):
    trainer = logging_trainer(tmp_path)
    trainer.step()
    trainer.teacher.backbone.blocks[0].mlp.fc1.weight.data = trainer.student.backbone.blocks[0].mlp.fc1.weight.data
    with pytest.raises(TrainingError, match=r"teacher aliases student: .*blocks.0.mlp.fc1.weight"):
        trainer.fit()
    assert trainer.metrics.diagnoses == ["teacher aliases student"]


def test_a_momentum_of_one_is_a_teacher_that_does_not_move(tmp_path):
    optim = {"base_lr": 0.03, "warmup_epochs": 0, "teacher_momentum": 1.0}
    assert set(fit(logging_trainer(tmp_path, optim=optim))) == {"teacher does not move"}


def test_a_learning_rate_of_zero_is_a_student_that_does_not_move(tmp_path):
    optim = {"base_lr": 0.0, "min_lr": 0.0, "warmup_epochs": 0}
    assert set(fit(logging_trainer(tmp_path, optim=optim))) == {"student does not move"}


class InfinitePixels(NoiseLoader):
    """From its third batch on."""

    def __next__(self):
        views = super().__next__()
        if self.samples > 2 * self.batch:
            views.global_crops.pixels[0, 0] = float("inf")
        return views


def test_non_finite_steps_are_named_and_end_the_run_when_they_do_not_stop(tmp_path):
    optim = {"base_lr": 0.03, "warmup_epochs": 0, "most_refused": 5}
    trainer = logging_trainer(tmp_path, optim=optim)
    trainer.batches.loader = InfinitePixels(trainer.run)
    sentence = (
        r"non-finite: .*skipped on all ranks \(5 in a row .*the loss term dino/cls\. The pixels are not finite: check"
    )
    with pytest.raises(TrainingError, match=sentence):
        trainer.fit()
    assert trainer.clock.step == 7
    assert trainer.metrics.diagnoses == ["non-finite"] * 5


def test_a_single_non_finite_step_is_named_and_does_not_end_the_run(tmp_path):
    trainer = logging_trainer(tmp_path)
    cut, calls = trainer.loader.cut, []

    def spoiled(ids, specs):
        crops = cut(ids, specs)
        calls.append(ids)
        if len(calls) == 5:  # global crops of the third step
            crops.pixels[0, 0] = float("nan")
        return crops

    trainer.loader.cut = spoiled
    assert fit(trainer) == ["non-finite"]
    assert trainer.clock.step == LINES


def sentences(trainer: Trainer) -> dict[str, str]:
    """The first sentence of each diagnosis of a run, by name."""
    found: dict[str, str] = {}
    trainer.metrics.diagnose = lambda clock, diagnosis: found.setdefault(diagnosis.name, diagnosis.sentence)
    trainer.fit()
    return found


def test_a_learning_rate_far_too_high_has_diverged(tmp_path):
    optim = {"base_lr": 1e3, "warmup_epochs": 0, "teacher_momentum": 0.9, "weight_decay": 0, "weight_decay_end": 0}
    found = sentences(logging_trainer(tmp_path, optim=optim))
    assert "times the norm that they had at the start" in found["diverged"]
    assert "the learning rate 31.25 undoes the last. Start again with a lower Optim.base_lr." in found["diverged"]


def test_a_run_says_at_its_start_what_is_seldom_meant(tmp_path, capsys):
    once = {"folder": str(tmp_path / "run"), "evaluate_every": 0}
    optim = {"teacher_momentum": 0.0, "warmup_epochs": 0}
    train(tiny_run(tmp_path, optim=optim, output=once, schedule={"epochs": 1, "steps_per_epoch": 1}))
    assert "note: The teacher is the student at the start: with Optim.teacher_momentum=0" in capsys.readouterr().out


class LargePixels(NoiseLoader):
    """Not normalized."""

    factor = 1e6

    def cut(self, ids, specs):
        crops = super().cut(ids, specs)
        return replace(crops, pixels=crops.pixels * self.factor)


@pytest.mark.parametrize("factor", [1e6, 128.0, 1e-3])
def test_pixels_that_nobody_normalized_are_named(factor, tmp_path):
    trainer = logging_trainer(tmp_path)
    trainer.batches.loader = LargePixels(trainer.run)
    trainer.batches.loader.factor = factor
    sentence = sentences(trainer)["pixels are not normalized"]
    size = float(re.search(r"root mean square (\S+), where normalized ones have about 1\. Subtract", sentence)[1])
    assert size == pytest.approx(factor, rel=0.1)


def test_a_loss_that_stays_far_above_chance_is_named(tmp_path):
    trainer = logging_trainer(tmp_path)
    log, lines = trainer.metrics.log, []

    def higher(clock, values):
        lines.append(clock.step)
        return {**log(clock, values), "dino/cls": 3.0 if len(lines) == 1 else 20.0}

    trainer.metrics.log = higher
    sentence = sentences(trainer)["loss above its start"]
    assert "dino/cls has been far above its start for 10 log lines: 20 now, 3 at first, and 3.611 = ln 37 " in sentence


@pytest.mark.parametrize(
    ("precision", "growth", "pixels", "advice"),
    [
        ("fp32", 1, 1.0, "Lower the learning rate; if it is the first steps, check the images"),
        ("fp32", 100, 1.0, "The weights have diverged: start again with a lower learning rate"),
        ("fp32", 1, float("nan"), "The pixels are not finite: check the images and the loader"),
        ("bf16", 1, 1.0, "Lower the learning rate"),
        ("fp16", 1, 1.0, "if they go on, use bf16 or fp32"),
    ],
)
def test_the_advice_after_a_step_that_was_not_finite_follows_from_the_cause(
    precision, growth, pixels, advice, tmp_path
):
    trainer = logging_trainer(tmp_path, parallel={"precision": precision})
    for parameter in trainer.student.parameters():
        parameter.data *= growth
    trainer.update.tally += torch.tensor([1.0, 1.0, 0.0])
    trainer.update.checked = ["the loss term dino/cls"]
    found = trainer.sentinels.check(trainer.clock, {"data/pixel_rms": pixels})
    sentence = next(diagnosis.sentence for diagnosis in found if diagnosis.name == "non-finite")
    assert advice in sentence
    assert ("fp32" in sentence) == (precision == "fp16"), "fp32 is advised only where it helps"
