"""Each failure is produced on purpose, and reported by its name."""

from dataclasses import replace

import pytest
import torch
from engine.tiny_run import DINO, NoiseLoader, tiny_run, tiny_trainer

from patchlight.engine.sentinels import PATIENCE, TrainingError, spread
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
    sentence = r"non-finite: .*skipped on all ranks \(5 in a row .*the loss term dino/cls"
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
