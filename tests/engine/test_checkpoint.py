"""Runs that are stopped or killed, resumed on other numbers of processes, or have a full disk; the exported teacher."""

import json
import os
import resource
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from engine.tiny_run import (
    DINO,
    SELFPATCH,
    MetricsInMemory,
    NoiseLoader,
    largest_difference,
    on_processes,
    outcome,
    tiny_run,
    tiny_trainer,
    train_tiny,
)
from safetensors.torch import load_file

from patchlight.checkpoint.folder import TEACHER, read_facts
from patchlight.engine import checkpoint
from patchlight.engine.assembly import build_trainer
from patchlight.engine.parallel import processes
from patchlight.process import StopRequest
from patchlight.report.run_folder import RUN_FILE
from patchlight_kernels import force

DROPS = {"image_size": 16, "patch_size": 4, "drop_path": 0.5, "sizes": {"width": 20, "depth": 2, "heads": 2}}
PARTS = ("student", "teacher", "objectives")


def resumed(run, **changes):
    return replace(run, output=replace(run.output, resume=True), **changes)


def saved_steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class LoaderWithAction(NoiseLoader):
    """Calls an action before one of its batches."""

    def __init__(self, run, mesh, batch: int, action) -> None:
        super().__init__(run, mesh)
        self.left, self.action = batch, action

    def __next__(self):
        if self.left == 0:
            self.action()
        self.left -= 1
        return super().__next__()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("save_async", [False, True], ids=["sync", "async"])
def test_ten_steps_and_ten_resumed_are_twenty_bit_for_bit(save_async, tmp_path):
    """Drop path draws random numbers, so this covers their state; the prototypes are frozen for five steps."""
    whole = train_tiny(tiny_run(tmp_path / "whole", model=DROPS))
    output = {"folder": str(tmp_path / "parts"), "save_every": 10, "log_every": 5, "save_async": save_async}
    run = tiny_run("", model=DROPS, output=output)
    first = build_trainer(run, None, NoiseLoader(run), MetricsInMemory())
    for _ in range(10):
        first.step()
    first.save()
    first.step()  # must not change the checkpoint that is still being written
    first.checkpoints.finish()
    torch.manual_seed(12345)
    second = train_tiny(resumed(run))
    assert [terms["loss"] for terms in second["terms"]] == [terms["loss"] for terms in whole["terms"][10:]]
    assert second["clock"] == whole["clock"]
    for part in PARTS:
        assert largest_difference(whole[part], second[part]) == 0, part


def train_with_saves(run) -> dict:
    return train_tiny(run) | {"saved": saved_steps(Path(run.output.folder))}


def test_asynchronous_saves_beside_the_training_of_two_processes(tmp_path):
    """Their collectives must not mix with the training's; the last checkpoint is the end of the run."""
    output = {"folder": str(tmp_path), "save_every": 2, "log_every": 5, "save_async": True, "keep": 20}
    run = tiny_run("", output=output, parallel={"precision": "fp32", "shard": 2}, data={"batch_per_rank": 4})
    ended = on_processes(2, train_with_saves, run)[0]
    assert ended["saved"] == [f"step-{step:08d}" for step in range(2, 21, 2)]
    trainer = tiny_trainer(resumed(run, parallel=replace(run.parallel, shard=1)))
    with pytest.warns(UserWarning, match="shard was 2 and is 1"):
        trainer.begin()
    assert largest_difference(outcome(trainer)["student"], ended["student"]) == 0


def test_resuming_in_the_frozen_epoch_keeps_the_prototypes_step_counters(tmp_path):
    """Frozen prototypes have had no update yet: their moments are zeros and their counters 0."""
    whole = train_tiny(tiny_run(tmp_path / "whole"))
    run = tiny_run(tmp_path / "parts")
    first = tiny_trainer(run)
    for _ in range(3):
        first.step()
    first.save()
    second = train_tiny(resumed(run))
    assert largest_difference(whole["student"], second["student"]) == 0


def save_after(run, steps: int) -> dict:
    with force(neighbor_topk="reference"), processes(run.parallel) as mesh:
        trainer = tiny_trainer(run, mesh)
        for _ in range(steps):
            trainer.step()
        trainer.save()
        return outcome(trainer)


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (4, 2)])
def test_a_checkpoint_moves_between_numbers_of_processes(writers, readers, tmp_path):
    """Written sharded or whole, read whole or sharded: the same run continues, up to rounding."""

    def run_on(count: int, folder: str):
        parallel = {"precision": "fp32", "shard": 2 if count > 1 else 1}
        return tiny_run(
            tmp_path / folder, options=(DINO, SELFPATCH), parallel=parallel, data={"batch_per_rank": 8 // count}
        )

    expected = train_tiny(run_on(1, "whole"))
    run = run_on(writers, "parts")
    if writers == 1:
        save_after(run, 10)
    else:
        on_processes(writers, save_after, run, 10)
    run = resumed(run_on(readers, "parts"))
    if readers == 1:
        with pytest.warns(UserWarning, match=r"differ from the checkpoint: data.batch_per_rank"):
            rest = train_tiny(run)
    else:
        rest = on_processes(readers, train_tiny, run)[0]
    assert rest["clock"] == expected["clock"]
    assert rest["terms"][0]["loss"] == pytest.approx(expected["terms"][10]["loss"], rel=1e-5)
    for part in PARTS:
        assert largest_difference(expected[part], rest[part]) < 2e-5, part


def test_the_latest_checkpoints_are_kept(tmp_path):
    output = {"folder": str(tmp_path), "save_every": 4, "keep": 2, "log_every": 5}
    train_tiny(tiny_run("", output=output))
    assert saved_steps(tmp_path) == ["step-00000016", "step-00000020"]
    facts = json.loads((tmp_path / "checkpoints/step-00000020/facts.json").read_text())
    assert facts["clock"] == {"step": 20, "total": 20, "images_seen": 160, "steps_per_epoch": 5}
    assert facts["run"] == json.loads((tmp_path / RUN_FILE).read_text())


def test_sigterm_leaves_a_checkpoint_and_the_run_continues_from_it(tmp_path, capsys):
    whole = train_tiny(tiny_run(tmp_path / "whole"))
    run = tiny_run(tmp_path / "parts")
    before = signal.getsignal(signal.SIGTERM)
    metrics = MetricsInMemory()
    build_trainer(run, None, LoaderWithAction(run, None, 7, terminate), metrics).fit()
    assert metrics.closed
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved_steps(tmp_path / "parts") == ["step-00000008"]
    assert "Stopped by SIGTERM after step 8" in capsys.readouterr().out
    rest = train_tiny(resumed(run))
    assert largest_difference(whole["student"], rest["student"]) == 0


def stop_one_rank(run) -> int:
    """Only rank 1 gets the signal; both must stop at the same step."""
    with processes(run.parallel) as mesh:
        loader = LoaderWithAction(run, mesh, 7, terminate if mesh.rank == 1 else int)
        trainer = build_trainer(run, mesh, loader, MetricsInMemory())
        trainer.fit()
        return trainer.clock.step


def test_sigterm_on_one_rank_stops_all_at_the_next_log_line(tmp_path):
    run = tiny_run(tmp_path, data={"batch_per_rank": 4})
    assert on_processes(2, stop_one_rank, run) == [10, 10]
    assert saved_steps(tmp_path) == ["step-00000010"]


def die_in_the_second_save(run) -> None:
    """kill -9 while the second checkpoint is almost written."""
    whole = checkpoint.write_rest

    def killed(partial, step, *rest):
        if step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(partial, step, *rest)

    checkpoint.write_rest = killed
    train_tiny(run)


def test_kill_minus_nine_leaves_the_previous_checkpoint(tmp_path):
    output = {"folder": str(tmp_path / "parts"), "save_every": 5, "log_every": 5}
    run = tiny_run("", output=output)
    with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
        on_processes(1, die_in_the_second_save, run)
    assert saved_steps(tmp_path / "parts") == ["step-00000005", "step-00000010.partial"]
    rest = train_tiny(resumed(run))
    whole = train_tiny(tiny_run(tmp_path / "whole"))
    assert largest_difference(whole["student"], rest["student"]) == 0
    assert not any(name.endswith(".partial") for name in saved_steps(tmp_path / "parts"))


def save_to_a_full_disk(run) -> str:
    with processes(run.parallel) as mesh:
        trainer = tiny_trainer(run, mesh)
        trainer.step()
        trainer.save()
        trainer.step()
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if mesh.rank == mesh.world - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            trainer.save()
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "saved"


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_leaves_the_previous_checkpoint(count, tmp_path):
    """A file size limit replaces the disk; of two processes only the last one reaches it, and both raise."""
    parallel = {"precision": "fp32", "shard": count}
    run = tiny_run(tmp_path, parallel=parallel, data={"batch_per_rank": 8 // count})
    for sentence in on_processes(count, save_to_a_full_disk, run):
        assert "step-00000002 could not be written" in sentence
        assert "resume from" in sentence
        assert "step-00000001" in sentence
    assert saved_steps(tmp_path) == ["step-00000001"]
    trainer = tiny_trainer(resumed(run, parallel=replace(run.parallel, shard=1)))
    with nullcontext() if count == 1 else pytest.warns(UserWarning, match="shard was 2 and is 1"):
        trainer.begin()
    assert trainer.clock.step == 1


@pytest.mark.parametrize("options", [(DINO,), (DINO, SELFPATCH)], ids=["class token", "class attention"])
def test_the_exported_teacher_loads_into_timm(options, tmp_path):
    run = tiny_run(tmp_path, options=options)
    with force(neighbor_topk="reference"):
        trainer = tiny_trainer(run)
        for _ in range(3):
            trainer.step()
    trainer.save()
    (path,) = (tmp_path / "checkpoints").glob(f"*/{TEACHER}")
    has_token = len(options) == 1
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 20, "depth": 2, "num_heads": 2}
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **sizes,
        num_classes=0,
        class_token=has_token,
        global_pool="token" if has_token else "",
        checkpoint_path=str(path),
    ).eval()
    pixels = torch.randn(2, 3, 16, 16)
    teacher = trainer.teacher
    with torch.no_grad():
        features = teacher.summary(teacher.backbone(pixels))
        from_timm = model.forward_features(pixels)
    torch.testing.assert_close(from_timm[:, 1:] if has_token else from_timm, features.patches, rtol=1e-5, atol=1e-5)
    if has_token:
        torch.testing.assert_close(from_timm[:, 0], features.summary, rtol=1e-5, atol=1e-5)


def test_the_export_of_shards_is_the_export_of_the_whole(tmp_path):
    whole = tiny_run(tmp_path / "whole")
    save_after(whole, 2)
    sharded = tiny_run(tmp_path / "sharded", parallel={"precision": "fp32", "shard": 2}, data={"batch_per_rank": 4})
    on_processes(2, save_after, sharded, 2)
    a, b = (load_file(tmp_path / name / "checkpoints/step-00000002" / TEACHER) for name in ("whole", "sharded"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def finished(run) -> None:
    trainer = tiny_trainer(run)
    trainer.step()
    trainer.save()


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    run = tiny_run(tmp_path)
    finished(run)
    with pytest.raises(ValueError, match=r"A new run needs a folder of its own, got .*; set Output.resume=True"):
        tiny_trainer(run).fit()


def test_resume_without_a_checkpoint_starts_anew_and_prints_it(tmp_path, capsys, monkeypatch):
    """On one line, however narrow the console and long the folder's name, brackets included."""
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / "a run whose folder [has] a long name that no console of forty columns has room for"
    trainer = tiny_trainer(resumed(tiny_run(folder)))
    trainer.begin()
    assert trainer.clock.step == 0
    assert f"Nothing to resume in {folder}: starting anew.\n" in capsys.readouterr().out


def test_a_finished_run_has_nothing_left_to_do(tmp_path, capsys):
    run = tiny_run(tmp_path, schedule={"epochs": 1, "steps_per_epoch": 5})
    tiny_trainer(run).fit()
    again = tiny_trainer(resumed(run))
    again.fit()
    assert again.clock.step == 5
    assert "Nothing left to do: 5 of 5 steps" in capsys.readouterr().out


def test_another_architecture_is_refused(tmp_path):
    run = tiny_run(tmp_path)
    finished(run)
    wider = replace(run.model, sizes={"width": 24, "depth": 2, "heads": 2})
    with pytest.raises(ValueError, match=r"model.sizes.width was 20 and is 24"):
        tiny_trainer(resumed(run, model=wider)).begin()


def test_another_objective_is_refused(tmp_path):
    run = tiny_run(tmp_path)
    finished(run)
    other = replace(run.objectives, options=(replace(DINO, teacher_temperature=0.3),))
    with pytest.raises(ValueError, match=r"teacher_temperature.*0.4.*0.3"):
        tiny_trainer(resumed(run, objectives=other)).begin()


def test_another_optimizer_is_refused(tmp_path):
    run = tiny_run(tmp_path)
    finished(run)
    with pytest.raises(ValueError, match=r"optim.name was 'adamw' and is 'lamb'"):
        tiny_trainer(resumed(run, optim=replace(run.optim, name="lamb"))).begin()


def test_another_learning_rate_is_accepted_with_a_warning(tmp_path):
    run = tiny_run(tmp_path)
    finished(run)
    with pytest.warns(UserWarning, match=r"optim.base_lr was 0.032 and is 0.01"):
        tiny_trainer(resumed(run, optim=replace(run.optim, base_lr=0.01))).begin()


def test_a_checkpoint_without_any_of_the_models_tensors_is_refused(tmp_path):
    run = tiny_run(tmp_path)
    finished(run)
    trainer = tiny_trainer(run)
    (folder,) = trainer.checkpoints.all()
    facts = read_facts(folder)
    trainer.checkpoints.save(facts["clock"]["step"], {"model": {"weight": torch.ones(3)}}, facts, {})
    with pytest.raises(ValueError, match=r"got none of its \d+ tensors"):
        tiny_trainer(resumed(run)).begin()


def test_a_checkpoint_without_some_tensors_is_refused(tmp_path):
    run = tiny_run(tmp_path)
    trainer = tiny_trainer(run)
    del trainer.teacher.heads["dino"].mlp[0].bias
    trainer.save()
    with pytest.raises(ValueError, match=r"got 1 tensors missing and 0 of another shape .*mlp.0.bias"):
        tiny_trainer(resumed(run)).begin()


def test_a_stop_request_restores_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.received
        terminate()
        assert request.received
    assert signal.getsignal(signal.SIGTERM) is before
