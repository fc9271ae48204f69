"""The best checkpoint by a number of the looks: kept beside the latest ones, right after kills, damage and resumed runs."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from engine.tiny_run import largest_difference, on_processes, tiny_run, tiny_trainer, train_tiny

from patchlight.checkpoint.best import Best, BestMark, read_best
from patchlight.checkpoint.folder import verify
from patchlight.data.procedural import ProceduralSource
from patchlight.data.stored import Images
from patchlight.engine import checkpoint
from patchlight.engine.parallel import processes
from patchlight.engine.probe import TeacherProbe
from patchlight.evaluation.checkpoints import open_checkpoint, run_folder_of
from patchlight.report.log_file import read_lines
from patchlight_kernels import force

VALUES = {0: 0.9, 4: 0.2, 8: 0.5, 12: 0.4, 16: 0.5, 20: math.nan}  # of the looks by step; 8 is the best


class Looks(TeacherProbe):
    """Looks with given values in place of the teacher's."""

    values: dict[int, float]

    def _evaluate(self, teacher, clock) -> dict[str, float]:
        found = {"k10": self.values[clock.step], "k20": 0.0}
        if self.writes:
            self.results.add({"step": clock.step, **found})
        return found


def run_with_best(folder, **output):
    return tiny_run(
        "",
        output={"folder": str(folder), "save_every": 6, "keep": 2, "log_every": 2, "evaluate_every": 4, "best": "k10"}
        | output,
        schedule={"epochs": 5, "steps_per_epoch": 4},
        optim={"base_lr": 0.03, "warmup_epochs": 1},
    )


def train(run, values=VALUES) -> None:
    with force(neighbor_topk="reference"), processes(run.parallel) as mesh:
        trainer = tiny_trainer(run, mesh)
        trainer.probe = Looks(run, ProceduralSource(40, size=16), mesh)
        trainer.probe.values = values
        trainer.fit()


def resumed(run, **output):
    return replace(run, output=replace(run.output, resume=True, **output))


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def best_of(folder: Path) -> tuple[int, float]:
    """The marked step and value; the link leads to its checkpoint, which is whole."""
    best = json.loads((folder / "best.json").read_text())
    assert best["name"] == "k10"
    assert (folder / "best").resolve() == (folder / f"checkpoints/step-{best['step']:08d}").resolve()
    assert verify(folder / "best") == []
    return best["step"], best["value"]


@pytest.mark.parametrize("save_async", [False, True], ids=["sync", "async"])
def test_the_best_is_kept_beside_the_latest(save_async, tmp_path, capsys):
    """Not the untrained teacher, though it is better; of equal ones the first; nan is never the best."""
    run = run_with_best(tmp_path, save_async=save_async)
    train(run)
    assert best_of(tmp_path) == (8, 0.5)
    assert saved(tmp_path) == [8, 18, 20]
    assert f"step 8: the best k10 so far; the checkpoint is kept as {tmp_path / 'best'}." in capsys.readouterr().out
    encoder = open_checkpoint(str(tmp_path / "best"))
    stored = open_checkpoint(str(tmp_path / "checkpoints/step-00000008"))
    weights = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}
    assert largest_difference(weights, {n: t.numpy() for n, t in stored.state_dict().items()}) == 0
    assert run_folder_of(str(tmp_path / "best")) == tmp_path.resolve()


@pytest.mark.parametrize("save_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("shard", [1, 2])
def test_on_two_processes(save_async, shard, tmp_path):
    run = run_with_best(tmp_path, save_async=save_async)
    run = replace(run, parallel=replace(run.parallel, shard=shard), data=replace(run.data, batch_per_rank=4))
    on_processes(2, train, run, VALUES)
    assert best_of(tmp_path) == (8, 0.5)
    assert saved(tmp_path) == [8, 18, 20]


def test_saves_for_the_best_change_nothing_else(tmp_path):
    whole = train_tiny(run_with_best(tmp_path / "whole", best="", evaluate_every=0))
    run = run_with_best(tmp_path / "best", keep=10)
    train(run)
    again = train_tiny(resumed(run))
    assert largest_difference(whole["student"], again["student"]) == 0
    shutil.rmtree(tmp_path / "best/checkpoints/step-00000020")
    for step in (12, 18):
        shutil.rmtree(tmp_path / f"best/checkpoints/step-{step:08d}")
    rest = train_tiny(resumed(run))
    assert len(rest["terms"]) == 12, "from the best one, at step 8"
    assert largest_difference(whole["student"], rest["student"]) == 0


def kill_before(run, function: str) -> None:
    """kill -9 before the checkpoint of step 8 is published, or marked."""
    place = checkpoint if function == "publish" else BestMark
    whole = getattr(place, function)

    def killed(*arguments):
        if getattr(arguments[-1], "step", None) == 8 or getattr(arguments[-1], "name", "") == "step-00000008":
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    setattr(place, function, killed)
    train(run)


@pytest.mark.parametrize(
    ("save_every", "save_async"), [(6, False), (6, True), (8, False)], ids=["apart", "apart, async", "together"]
)
@pytest.mark.parametrize("function", ["publish", "mark", "delete_old"])
def test_a_kill_at_any_moment_of_the_marking(function, save_every, save_async, tmp_path):
    """Recorded and not written, or written and not marked: the resumed run ends as the one that nothing happened to."""
    run = run_with_best(tmp_path, save_every=save_every, save_async=save_async)
    killed = kill_before_deleting if function == "delete_old" else kill_before
    with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
        on_processes(1, killed, run, function)
    before = [4] if function != "delete_old" else [4, 8]
    marked = read_best(tmp_path / "best.json")
    assert marked is None or marked.step in before
    train(resumed(run))
    assert best_of(tmp_path) == (8, 0.5)
    assert [line["step"] for line in read_lines(tmp_path / "knn.jsonl")] == list(VALUES)
    assert saved(tmp_path) == [8, *([18, 20] if save_every == 6 else [16, 20])]


def kill_before_deleting(run, function: str) -> None:
    """kill -9 when the checkpoint of step 8 is marked, before older ones are deleted."""
    whole = checkpoint.delete_old

    def killed(folder, keep, also):
        if also == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(folder, keep, also)

    checkpoint.delete_old = killed
    train(run)


def test_lost_lines_do_not_lose_the_best(tmp_path):
    """As after a loss of power: best.json was on the disk, its look was not."""
    run = run_with_best(tmp_path)
    train(run)
    shutil.rmtree(tmp_path / "checkpoints/step-00000020")
    (tmp_path / "knn.jsonl").write_text('{"step": 16, "k10": 0.45, "k20": 0.0}\n')
    train(resumed(run), VALUES | {20: 0.46})
    assert best_of(tmp_path) == (8, 0.5)


def test_a_damaged_best_is_named_and_the_best_of_the_others_marked(tmp_path, capsys):
    run = run_with_best(tmp_path, keep=3)
    train(run)
    assert saved(tmp_path) == [8, 12, 18, 20]
    (tmp_path / "checkpoints/step-00000008/teacher.safetensors").write_bytes(b"other")
    shutil.rmtree(tmp_path / "checkpoints/step-00000020")
    capsys.readouterr()
    train(resumed(run))
    printed = capsys.readouterr().out
    assert "step-00000008" in printed
    assert "It is now called step-00000008.damaged; the best of the others is marked." in printed
    assert best_of(tmp_path) == (12, 0.4)


def test_a_lost_or_wrong_mark_is_made_again(tmp_path):
    run = run_with_best(tmp_path)
    train(run)
    for damage in ("{", '{"name": "k10", "value": "high", "step": 8}', '{"name": "k10", "value": 0.7, "step": 2}'):
        (tmp_path / "best.json").write_text(damage)
        (tmp_path / "best").unlink()
        train(resumed(run))
        assert best_of(tmp_path) == (8, 0.5)


def test_another_number_begins_with_the_looks_that_were_taken(tmp_path):
    values = dict.fromkeys(VALUES, 0.1)
    run = run_with_best(tmp_path, keep=10)
    train(run, values)
    lines = read_lines(tmp_path / "knn.jsonl")
    lines[3]["k20"] = 0.3  # step 12, of which there is a checkpoint
    (tmp_path / "knn.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(resumed(run, best="k20"), values)
    assert read_best(tmp_path / "best.json") == Best("k20", 0.3, 12)


def test_a_file_system_without_links_is_said(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.warns(UserWarning, match=r"should be a link to the best checkpoint, got .*checkpoints/step-00000008"):
        train(run_with_best(tmp_path))
    assert read_best(tmp_path / "best.json") == Best("k10", 0.5, 8)
    assert saved(tmp_path) == [8, 18, 20]


@pytest.mark.parametrize(
    ("best", "images", "found"),
    [
        ("k2", 40, r"must be a number of the evaluations, k10 or k20, got 'k2'; perhaps k20 is meant"),
        ("knn_top1", 40, r"got 'knn_top1'; use k20"),
        ("k20", 12, r"must be a number of the evaluations, k10, got 'k20'"),
    ],
)
def test_a_wrong_name_is_refused_at_the_start(best, images, found, tmp_path):
    run = run_with_best(tmp_path, best=best)
    trainer = tiny_trainer(run)
    with pytest.raises(ValueError, match=found):
        TeacherProbe(run, ProceduralSource(images, size=16), trainer.mesh)


def test_without_labels_or_looks_there_is_no_best(tmp_path):
    class Unlabeled(Images):
        labels, classes = None, ()

        def __len__(self) -> int:
            return 40

    run = run_with_best(tmp_path)
    with pytest.raises(ValueError, match=r"Output.best needs labeled images, got 'k10' for images without labels"):
        TeacherProbe(run, Unlabeled(), tiny_trainer(run).mesh)
    with pytest.raises(ValueError, match=r"Output.best needs evaluations of the teacher, got best='k10'"):
        run_with_best(tmp_path, evaluate_every=0)
