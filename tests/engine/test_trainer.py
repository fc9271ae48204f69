"""The loop: what a step does, what is printed, and that nothing waits for the device between log lines."""

from dataclasses import replace

import pytest
import torch
from engine.tiny_run import (
    COMBINATIONS,
    DINO,
    MOBY,
    MetricsInMemory,
    NoiseLoader,
    Prepared,
    largest_difference,
    on_processes,
    tiny_run,
    tiny_trainer,
    train_tiny,
)
from torch.utils._python_dispatch import TorchDispatchMode

from patchlight.engine.assembly import build_trainer, train
from patchlight.engine.parallel import processes
from patchlight.engine.schedules import cosine
from patchlight_kernels import force


class NoHostSync(TorchDispatchMode):
    """Fails where a tensor's value would reach Python: on a GPU the host would wait there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(bad in name for bad in ("_local_scalar_dense", "nonzero", "item")), (
            f"{name} waits for the device"
        )
        return function(*args, **(kwargs or {}))


def test_a_wait_is_found():
    with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(()) > 0)


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb"])
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_step_does_not_wait_for_the_device(options, optimizer, tmp_path):
    parallel = {"precision": "fp16", "accumulate": 2}
    trainer = tiny_trainer(tiny_run(tmp_path, options=options, optim={"name": optimizer}, parallel=parallel))
    trainer.batches.loader = Prepared(trainer.loader, 4)
    with force(neighbor_topk="reference"):
        trainer.step()  # optimizer states are made here
        with NoHostSync():
            trainer.step()


def test_the_schedules_are_those_of_the_step(tmp_path):
    optim = {
        "base_lr": 0.5,
        "min_lr": 0.001,
        "warmup_epochs": 1,
        "weight_decay": 0.1,
        "weight_decay_end": 0.3,
        "teacher_momentum": 0.9,
    }
    trainer = tiny_trainer(tiny_run(tmp_path, optim=optim, parallel={"precision": "fp32", "accumulate": 2}))
    peak = 0.5 * 16 / 256
    for step in range(20):
        trainer.clock = replace(trainer.clock, step=step)
        rates = trainer.step_values.schedule(trainer.clock)
        assert rates["lr"] == cosine(step, 20, peak, 0.001, 5)
        assert rates["weight_decay"] == cosine(step, 20, 0.1, 0.3)
        assert rates["momentum"] == cosine(step, 20, 0.9, 1.0)
        assert rates["freeze_prototypes"] == (step < 5)
    assert [round(cosine(step, 20, peak, 0.001, 5) / peak, 6) for step in (0, 2, 4, 5)] == [0, 0.5, 1, 1]


def test_the_clock_counts_steps_and_images(tmp_path):
    trainer = tiny_trainer(tiny_run(tmp_path, parallel={"precision": "fp32", "accumulate": 3}))
    trainer.step()
    trainer.step()
    assert (trainer.clock.step, trainer.clock.images_seen, trainer.loader.samples) == (2, 48, 48)


def test_log_lines_come_when_due(tmp_path):
    trainer = tiny_trainer(tiny_run(tmp_path, schedule={"epochs": 1, "steps_per_epoch": 7}))
    trainer.fit()
    assert len(trainer.metrics.steps) == 7
    assert len(trainer.metrics.lines) == 2  # after step 5 and at the end
    waits = [line["data/wait_seconds"] for line in trainer.metrics.lines]
    assert waits == [5 * 0.125, 2 * 0.125]
    assert trainer.metrics.lines[1]["lr"] == cosine(6, 7, 1e-3, 1e-6, 7)
    expected = {"dino/cls", "loss", "gradient/norm", "step/refused", "teacher/spread", "lr"}
    assert expected <= trainer.metrics.lines[0].keys()


def test_the_table_has_the_origin_of_the_learning_rate(tmp_path, capsys):
    run = tiny_run(tmp_path, parallel={"precision": "fp32", "accumulate": 4})
    tiny_trainer(run).begin()
    printed = capsys.readouterr().out
    for words in ("32", "8 x 1 processes x 4 accumulated", "0.004", "linear rule: 0.032 x 32 / 256", "5 steps", "20"):
        assert words in printed, words


def test_an_epoch_follows_the_data(tmp_path):
    run = tiny_run(tmp_path, schedule={"epochs": 3, "steps_per_epoch": None})
    loader = NoiseLoader(run)
    loader.dataset_size = 8 * 11 + 3
    assert build_trainer(run, None, loader, MetricsInMemory()).clock.total == 33
    loader.dataset_size = 7
    with pytest.raises(ValueError, match=r"at least one global batch, got 7 images for 8"):
        build_trainer(run, None, loader, MetricsInMemory())


def test_equal_seeds_give_equal_weights_and_other_seeds_others(tmp_path):
    def first_weight(seed: int) -> torch.Tensor:
        parallel = {"precision": "fp32", "seed": seed}
        return tiny_trainer(tiny_run(tmp_path, parallel=parallel)).student.backbone.pos_embed

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_a_student_learns_the_outputs_of_a_fixed_teacher(tmp_path):
    """With other weights and the same eight images in each step, the loss falls towards the entropy of the teacher's outputs."""
    optim = {"base_lr": 0.1, "warmup_epochs": 0, "teacher_momentum": 1.0}
    dino = replace(DINO, student_temperature=0.1, teacher_temperature=0.1, center_momentum=1.0)
    trainer = tiny_trainer(tiny_run(tmp_path, options=(dino,), optim=optim))
    with torch.no_grad():
        for parameter in trainer.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(20):
        trainer.loader.samples = 0
        trainer.step()
    losses = [step["loss"].item() for step in trainer.metrics.steps]
    assert losses[0] > losses[5] > losses[10] > losses[-1]
    head, views = trainer.teacher.heads["dino"], next(trainer.loader)
    p = (head.prototypes.logits(head(trainer.teacher(views)[0].summary)) / 0.1).softmax(dim=-1)
    entropy = -(p * p.log()).sum(dim=-1).mean()
    assert entropy < losses[-1] < entropy + 0.3 * (losses[0] - entropy), losses


def test_deterministic_algorithms_are_on_for_a_deterministic_run(tmp_path):
    try:
        first, second = (
            train_tiny(tiny_run(tmp_path, parallel={"precision": "fp32", "deterministic": True}), 3) for _ in range(2)
        )
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert largest_difference(first["student"], second["student"]) == 0


def random_stream(run) -> int:
    with processes(run.parallel) as mesh:
        tiny_trainer(run, mesh)
        return torch.initial_seed()


def test_ranks_drop_different_paths(tmp_path):
    seeds = on_processes(2, random_stream, tiny_run(tmp_path, data={"batch_per_rank": 4}))
    assert len(set(seeds)) == 2


def test_train_runs_a_recipe_from_its_description_alone(tmp_path):
    """With the real loader and the real metrics."""
    data = {"loader": "procedural", "batch_per_rank": 4, "workers": 0, "procedural_images": 16}
    run = tiny_run(tmp_path, data={**data, "crops": tiny_run("").data.crops}, schedule={"epochs": 1})
    train(run)
    assert {"run.json", "metrics.jsonl", "checkpoints"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "checkpoints" / "step-00000005" / "teacher.safetensors").exists()


def test_a_refused_step_leaves_nothing_in_the_queue(tmp_path):
    """Neither keys nor BatchNorm statistics; the next step starts from the state before it."""
    trainer = tiny_trainer(tiny_run(tmp_path, options=(MOBY,)))
    trainer.step()
    before = {
        name: buffer.clone()
        for module in (trainer.student, trainer.teacher, trainer.objectives)
        for name, buffer in module.named_buffers()
    }
    good = trainer.loader
    bad = next(NoiseLoader(trainer.run))
    bad.global_crops.pixels[0, 0, 0, 0, 0] = float("nan")
    trainer.batches.loader = Prepared(good, 0)
    trainer.loader.views = [bad]
    trainer.step()
    assert trainer.metrics.steps[-1]["step/refused"] == 1
    for module in (trainer.student, trainer.teacher, trainer.objectives):
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, before[name]), name
    trainer.batches.loader = good
    trainer.step()
    assert trainer.metrics.steps[-1]["step/refused"] == 0
    assert trainer.objectives.parts[0].oldest == 16
