"""Resuming: damaged checkpoints, looks at the teacher that a kill has cut off, Ctrl-C."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from engine.test_checkpoint import LoaderWithAction, resumed
from engine.tiny_run import (
    MetricsInMemory,
    largest_difference,
    on_processes,
    outcome,
    tiny_run,
    tiny_trainer,
    train_tiny,
)

from patchlight.checkpoint.folder import complete
from patchlight.data.procedural import ProceduralSource
from patchlight.engine.assembly import build_trainer
from patchlight.engine.parallel import processes
from patchlight.engine.probe import TeacherProbe
from patchlight.process import FolderLock, StopRequest, end_with_launcher
from patchlight.report.log_file import read_lines
from patchlight.report.run_folder import KNN_FILE


def saving_run(folder: Path, **parts):
    return tiny_run("", output={"folder": str(folder), "save_every": 5, "log_every": 5, "keep": 10}, **parts)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def damage(path: Path, file: str = "rank-0000.safetensors") -> None:
    data = bytearray((path / file).read_bytes())
    data[-1000] ^= 16
    (path / file).write_bytes(data)


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_are_named_and_kept(tmp_path, capsys):
    run = saving_run(tmp_path)
    whole = train_tiny(run)
    paths = complete(tmp_path / "checkpoints")
    damage(paths[-1])
    (paths[-2] / "facts.json").write_text(json.dumps({"clock": {"step": -5}}))
    rest = train_tiny(resumed(run))
    said = "".join(capsys.readouterr().out.split())  # the console breaks lines anywhere
    assert "gotarank-0000.safetensorswithotherbytes" in said
    assert "gotafacts.jsonof23bytesinsteadof" in said
    assert "Itisnowcalledstep-00000015.damaged" in said
    assert len(rest["terms"]) == 10
    assert largest_difference(whole["student"], rest["student"]) == 0
    damaged = ["step-00000015.damaged", "step-00000020.damaged"]
    assert [name for name in names_in(tmp_path) if "damaged" in name] == damaged
    assert [path.name for path in complete(tmp_path / "checkpoints")][-1] == "step-00000020"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(tmp_path):
    run = saving_run(tmp_path)
    train_tiny(run)
    for path in complete(tmp_path / "checkpoints"):
        damage(path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must have one, got only .*step-00000020.damaged; copy an intact one"):
            tiny_trainer(resumed(run)).begin()


def resume_on_ranks(run) -> int:
    with processes(run.parallel) as mesh:
        trainer = tiny_trainer(run, mesh)
        trainer.begin()
        return trainer.clock.step


@pytest.mark.parametrize("file", ["rank-0000.safetensors", "rank-0001.safetensors", "facts.json", "manifest.json"])
def test_ranks_share_the_reading_and_take_the_same_checkpoint(file, tmp_path):
    run = saving_run(tmp_path, parallel={"precision": "fp32", "shard": 2}, data={"batch_per_rank": 4})
    on_processes(2, train_tiny, run)
    damage(complete(tmp_path / "checkpoints")[-1], file) if file[0] == "r" else (
        complete(tmp_path / "checkpoints")[-1] / file
    ).write_text("{}")
    assert on_processes(2, resume_on_ranks, resumed(run)) == [15, 15]


def watched(run, trainer=None):
    trainer = trainer or tiny_trainer(run)
    trainer.probe = TeacherProbe(run, ProceduralSource(40, seed=1), trainer.mesh)
    return trainer


def looks(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / KNN_FILE)]


class Killed(BaseException):
    """In place of a kill."""


def test_a_look_that_a_kill_has_cut_off_is_taken_when_the_run_resumes(tmp_path, monkeypatch):
    """The last one too: nothing but the look is left to do then."""
    run = saving_run(tmp_path)
    trainer = watched(run)
    take = trainer.evaluate_teacher

    def killed():
        if trainer.clock.step == 20:
            raise Killed
        return take()

    monkeypatch.setattr(trainer, "evaluate_teacher", killed)
    with pytest.raises(Killed):
        trainer.fit()
    assert looks(tmp_path) == [0, 5, 10, 15]
    for _ in range(2):
        again = watched(resumed(run))
        again.fit()
        assert again.clock.step == 20
        assert looks(tmp_path) == [0, 5, 10, 15, 20]


def test_a_start_over_does_not_double_the_first_look(tmp_path):
    run = saving_run(tmp_path)
    watched(run).evaluate_teacher()
    assert looks(tmp_path) == [0]
    trainer = watched(resumed(run))
    trainer.fit()
    assert looks(tmp_path) == [0, 5, 10, 15, 20]
    assert trainer.first_probe


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_and_the_run_continues_from_it(tmp_path, capsys):
    whole = train_tiny(tiny_run(tmp_path / "whole"))
    run = tiny_run(tmp_path / "parts")
    before = signal.getsignal(signal.SIGINT)
    build_trainer(run, None, LoaderWithAction(run, None, 7, interrupt), MetricsInMemory()).fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert names_in(tmp_path / "parts") == ["step-00000008"]
    assert "Stopped by Ctrl-C after step 8; continue with" in " ".join(capsys.readouterr().out.split())
    rest = train_tiny(resumed(run))
    assert largest_difference(whole["student"], rest["student"]) == 0


def test_a_second_ctrl_c_ends_at_once():
    with StopRequest() as request:
        interrupt()
        assert request.received == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_a_stopped_run_takes_its_due_look_when_it_resumes(tmp_path):
    """A scheduler that has sent SIGTERM kills soon, so the checkpoint comes first."""
    run = saving_run(tmp_path)
    trainer = build_trainer(run, None, LoaderWithAction(run, None, 4, interrupt), MetricsInMemory())
    watched(run, trainer).fit()
    assert (trainer.clock.step, looks(tmp_path)) == (5, [0])
    again = watched(resumed(run))
    again.fit()
    assert looks(tmp_path) == [0, 5, 10, 15, 20]
    assert outcome(again)["clock"] == train_tiny(tiny_run(tmp_path / "whole"))["clock"]


def test_asynchronous_saves_complete_without_the_training(tmp_path):
    """A checkpoint is complete when it is written, not at the next log line."""
    run = saving_run(tmp_path)
    run = replace(run, output=replace(run.output, save_async=True))
    trainer = tiny_trainer(run)
    trainer.step()
    trainer.save()
    trainer.checkpoints.under_way[0].result()
    assert [path.name for path in complete(tmp_path / "checkpoints")] == ["step-00000001"]


def hold_a_folder(folder: Path, say) -> None:
    lock = FolderLock(folder, print)
    say.send(lock.other)
    say.recv()  # until it is killed


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of the run's folder."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=hold_a_folder, args=(tmp_path, there))
    process.start()
    assert here.recv() == ""
    yield process
    process.kill()
    process.join()


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(tmp_path, holder, capsys):
    run = saving_run(tmp_path)
    with pytest.raises(
        ValueError, match=rf"One run at a time .* got another one \(process {holder.pid} on .*, started"
    ):
        tiny_trainer(run).fit()
    assert complete(tmp_path / "checkpoints") == []
    holder.kill()
    holder.join()
    tiny_trainer(run).fit()
    assert f"Therunofprocess{holder.pid}on" in "".join(capsys.readouterr().out.split())
    train_tiny(resumed(run))
    assert "ended without a word" not in capsys.readouterr().out


def refused_ranks(run) -> str:
    with processes(run.parallel) as mesh:
        try:
            tiny_trainer(run, mesh).fit()
        except ValueError as error:
            return str(error)
    return ""


def test_every_rank_is_refused(tmp_path, holder):
    run = saving_run(tmp_path, data={"batch_per_rank": 4})
    assert all("another one" in error for error in on_processes(2, refused_ranks, run))


def launch(say) -> None:
    """Stands for torchrun: starts a rank, and is killed."""
    rank = os.fork()
    if rank == 0:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
        end_with_launcher()
        say.send(os.getpid())
        signal.pause()
    signal.pause()


@pytest.mark.skipif(sys.platform != "linux", reason="a request to Linux")
def test_a_rank_ends_when_its_launcher_is_killed():
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    launcher = context.Process(target=launch, args=(there,))
    launcher.start()
    there.close()
    rank = here.recv()
    assert Path(f"/proc/{rank}").exists()
    launcher.kill()
    launcher.join()
    with pytest.raises(EOFError):  # the other end is closed when the rank has ended
        here.recv()


def test_a_rank_whose_launcher_has_ended_before_it_began_does_not_wait(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as launcher:
        port = launcher.getsockname()[1]
        here = {"RUN_ID": "none", "USE_AGENT_STORE": "True"}
        for name, value in {f"TORCHELASTIC_{name}": value for name, value in here.items()}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setattr("patchlight.process.end_with_parent", lambda number: None)
        end_with_launcher()
    with pytest.raises(ConnectionError, match=rf"needs the launcher that has started it, got none at 127.0.0.1:{port}"):
        end_with_launcher()
