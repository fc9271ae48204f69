"""Runs on data sets of the user's own: resumed bit for bit, on several ranks, from Python and by the function of a file."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data.pictures import picture
from engine.test_parallel import STEP_LENGTH
from engine.tiny_run import MetricsInMemory, largest_difference, on_processes, outcome, tiny_run
from torch.utils.data import Dataset, IterableDataset

import patchlight
from patchlight.command import main
from patchlight.engine.assembly import build_trainer
from patchlight.engine.parallel import processes
from patchlight.recipes.config_file import read_config

pytestmark = pytest.mark.filterwarnings("ignore:.*pass \\d+ has ended", "ignore:.*read again and dropped")

COUNT = 27


class Numbered(Dataset):
    def __init__(self, labels: bool = True) -> None:
        if labels:
            self.targets, self.classes = [number % 3 for number in range(COUNT)], ["a", "b", "c"]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        return picture(index), index % 3


class Iterated(IterableDataset):
    def __iter__(self):
        for number in range(COUNT):
            yield picture(number)


KINDS = {"numbered": Numbered, "iterable": Iterated}

FILE = """
import os
import numpy as np
from data.pictures import picture
from engine.test_own_data import Iterated, Numbered

def numbered():
    return Numbered()

def iterable():
    return Iterated()

class Shard:
    sharded = True

    def __iter__(self):
        rank = int(os.environ["RANK"])
        for number in range(20 + rank):  # passes end at different steps
            yield picture(100 * rank + number)

def shards():
    return Shard()
"""


def own_run(folder: Path, path: str = "", **parts):
    data = {"path": path, "loader": "auto", "workers": 0, **parts.pop("data", {})}
    output = {"folder": str(folder), "save_every": 5, "log_every": 5, "keep": 10, **parts.pop("output", {})}
    return tiny_run(folder, data=data, output=output, schedule={"epochs": 2, "steps_per_epoch": 5}, **parts)


def trained(run, source=None, steps: int = 10, save: bool = False) -> dict:
    """So many steps from the newest checkpoint on, or from the start."""
    with processes(run.parallel) as mesh:
        trainer = build_trainer(run, mesh, metrics=MetricsInMemory(), source=source)
        trainer.begin()
        while trainer.clock.step < steps:
            trainer.step()
        if save:
            trainer.save()
            trainer.checkpoints.finish()
        trainer.loader.close()
        return outcome(trainer)


def resumed(run):
    return replace(run, output=replace(run.output, resume=True))


def assert_equal(one: dict, two: dict) -> None:
    for part in ("student", "teacher", "objectives"):
        assert largest_difference(one[part], two[part]) == 0
    assert one["clock"] == two["clock"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_one_that_was_never_stopped(kind, workers, accumulate, tmp_path):
    """It stops within a pass, after one has ended; batches are read ahead."""
    parts = {"data": {"workers": workers, "batch_per_rank": 8 // accumulate}}
    parts["parallel"] = {"precision": "fp32", "accumulate": accumulate}
    whole = trained(own_run(tmp_path / "whole", **parts), KINDS[kind]())
    run = own_run(tmp_path / "stopped", **parts)
    trained(run, KINDS[kind](), steps=6, save=True)
    rest = trained(resumed(run), KINDS[kind]())
    assert len(rest["terms"]) == 4
    assert rest["terms"] == whole["terms"][6:]
    assert_equal(rest, whole)


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "my images.py").write_text(FILE)
    return tmp_path / "my images.py"


@pytest.mark.parametrize("name", ["numbered", "iterable"])
def test_two_ranks_train_on_the_images_of_one(name, mine, tmp_path):
    """And may be resumed by one."""
    path = f"{mine}:{name}"
    single = trained(own_run(tmp_path / "one", path))
    run = own_run(tmp_path / "two", path, data={"batch_per_rank": 4})
    two = on_processes(2, trained, run, None, 6, True)
    for before, after in zip(single["terms"], two[0]["terms"], strict=False):
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-5)
    rest = trained(resumed(own_run(tmp_path / "two", path)))
    assert largest_difference(single["student"], rest["student"]) < STEP_LENGTH / 20, "fp32 rounding"
    assert rest["clock"] == single["clock"]


def test_a_sharded_iterable_resumes_at_the_place_of_each_rank(mine, tmp_path):
    path = f"{mine}:shards"
    whole = on_processes(2, trained, own_run(tmp_path / "whole", path, data={"batch_per_rank": 4}))
    run = own_run(tmp_path / "stopped", path, data={"batch_per_rank": 4})
    on_processes(2, trained, run, None, 6, True)
    facts = json.loads((tmp_path / "stopped/checkpoints/step-00000006/facts.json").read_text())
    assert [place["taken"] for place in facts["loader"]["of_ranks"]] == [4, 3]
    rest = on_processes(2, trained, resumed(run))
    assert rest[0]["terms"] == whole[0]["terms"][6:]
    for one, two in zip(rest, whole, strict=True):
        assert_equal(one, two)


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_train_takes_a_data_set_with_labels(tmp_path, capsys):
    folder = tmp_path / "run"
    run = own_run(folder, "path/to/images", data={"workers": 1})
    patchlight.train(run, source=Numbered())
    printed = said(capsys)
    assert "note: the images come from the Numbered that was passed, not from path/to/images" in printed
    assert "loader torchvision a data set of your own is read by Python, not by NVIDIA DALI" in printed
    assert [json.loads(line)["step"] for line in (folder / "knn.jsonl").read_text().splitlines()] == [0, 5, 10]
    data = json.loads((folder / "run.json").read_text())["data"]
    assert (data["path"], data["loader"]) == ("source=Numbered", "torchvision")
    assert (folder / "plots" / "crops-0000000.png").is_file()
    again, _ = read_config(folder)
    with pytest.raises(
        ValueError, match=r"passed to train as source, .* got only the name of their class, source=Numbe"
    ):
        patchlight.train(resumed(again))
    patchlight.train(resumed(again), source=Numbered())
    printed = said(capsys)
    assert "Nothing left to do: 10 of 10 steps are done." in printed
    assert "note: the images come from" not in printed
    encoder = patchlight.load_teacher(str(folder))
    assert torch.isfinite(encoder(torch.zeros(2, 3, 16, 16)).summary).all()


def test_what_a_run_does_without_labels_is_said(tmp_path, capsys):
    patchlight.train(own_run(tmp_path / "a"), source=Numbered(labels=False))
    assert "note: the images have no classes, so the teacher's k-NN accuracy is not computed" in said(capsys)
    assert (tmp_path / "a" / "plots" / "attention-0000010.png").is_file()
    patchlight.train(own_run(tmp_path / "b"), source=Iterated())
    assert "note: the images of an iterable have neither numbers nor classes, so the teacher's k-NN" in said(capsys)
    for name in "ab":
        assert not (tmp_path / name / "knn.jsonl").exists()


def test_a_source_takes_the_place_of_generated_images(tmp_path):
    run = own_run(tmp_path, data={"loader": "procedural"})
    trainer = build_trainer(run, source=Numbered())
    assert (trainer.loader.source.title, trainer.run.data.loader) == ("Numbered", "torchvision")


def test_what_cannot_be_is_named(tmp_path):
    run = own_run(tmp_path)
    without = replace(run, schedule=replace(run.schedule, steps_per_epoch=None))
    with pytest.raises(ValueError, match=r"over an iterable needs Schedule.steps_per_epoch, .* got none; set how many"):
        build_trainer(without, source=Iterated())
    assert build_trainer(without, source=Numbered()).clock.steps_per_epoch == COUNT // 8
    dali = replace(run, data=replace(run.data, loader="dali"))
    with pytest.raises(
        ValueError, match=r'threads, which a data set of your own may not allow, got Data.loader="dali"; use'
    ):
        build_trainer(dali, source=Numbered())
    with pytest.raises(ValueError, match=r"Data.path must be set for every loader except procedural, .* got path=''"):
        build_trainer(run)


def test_a_function_of_a_file_is_a_path_of_the_command_line(mine, tmp_path, capsys, monkeypatch):
    """In a dry run, in a run, in one that is resumed by its settings, and in an evaluation of its images."""
    monkeypatch.chdir(tmp_path)
    run = own_run(tmp_path / "run", f"{mine.name}:iterable")
    (tmp_path / "settings.json").write_text(json.dumps(run.to_dict()))
    main(["train", "--config", "settings.json", "--dry-run"])
    assert "Nothing was written" in said(capsys)
    main(["train", "--config", "settings.json"])
    assert json.loads((tmp_path / "run/run.json").read_text())["data"]["path"] == "my images.py:iterable"
    more = ["--schedule.epochs", "3", "--output.resume"]
    with pytest.warns(UserWarning, match="Iterated: 26 items of pass 3 are read again and dropped"):
        main(["train", "--config", "run", *more])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15]
    assert all(np.isfinite(line["loss"]) for line in lines)
    main(["check-data", f"{mine.name}:numbered"])
    assert f"0 of {COUNT} images are bad" in said(capsys)
    main(["evaluate", "attention", "--checkpoint", "run", "--data", f"{mine.name}:numbered", "--out", "drawn"])
    assert list((tmp_path / "drawn").rglob("*.png"))
