"""Whole runs on files: each loader, a folder with a bad file, resuming with the same images, the loader printed."""

import json
from dataclasses import replace

import pytest
import torch
from data.pictures import write_pictures
from engine.tiny_run import tiny_run

from patchlight.data.loaders import dali_is_there
from patchlight.engine.assembly import build_trainer, train

needs_dali = pytest.mark.skipif(not dali_is_there(), reason="NVIDIA DALI is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read")


@pytest.fixture
def images(tmp_path):
    write_pictures(tmp_path / "images", [f"{number:02}.jpg" for number in range(32)])
    (tmp_path / "images" / "05.jpg").write_bytes(b"")
    return tmp_path / "images"


def run_over(images, folder, loader: str, **parts):
    data = {"path": str(images), "loader": loader, "workers": 1, **parts.pop("data", {})}
    return tiny_run(folder, data=data, schedule={"epochs": 2, "steps_per_epoch": 4}, **parts)


@pytest.mark.parametrize(
    ("requested", "used"), [("auto", "torchvision"), pytest.param("dali", "dali", marks=needs_dali)]
)
def test_a_folder_with_a_bad_file_trains_to_the_end_and_the_loader_is_printed(
    images, tmp_path, capsys, requested, used
):
    if torch.cuda.is_available():
        used = "dali"
    folder = tmp_path / "run"
    train(run_over(images, folder, requested, output={"folder": str(folder), "evaluate_every": 0, "log_every": 4}))
    assert json.loads((folder / "run.json").read_text())["data"]["loader"] == used
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"loader {used} " in printed
    assert ("set by Data.loader" if requested == used else "no GPU") in printed or torch.cuda.is_available()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 8
    assert lines[-1]["data/replaced"] == 2, "once in each of two epochs"
    assert all(line["data/wait_seconds"] > 0 for line in lines)
    assert (folder / "bad_files.tsv").read_text().split("\t")[0].endswith("05.jpg")


@needs_dali
def test_a_stopped_run_continues_with_the_same_images(images, tmp_path):
    def ids(trainer, count):
        batches, forward = [], trainer.device_step.forward

        def keep(views, now):
            batches.append((views.ids, views.global_crops.pixels))
            return forward(views, now)

        trainer.device_step.forward = keep
        for _ in range(count):
            trainer.step()
        trainer.loader.close()
        return batches

    whole = ids(build_trainer(run_over(images, tmp_path / "a", "dali")), 7)
    first = build_trainer(run_over(images, tmp_path / "b", "dali"))
    before = ids(first, 3)
    first.save()
    first.checkpoints.finish()
    run = run_over(images, tmp_path / "b", "dali")
    second = build_trainer(replace(run, output=replace(run.output, resume=True)))
    second.begin()
    for (left, pixels), (right, again) in zip(before + ids(second, 4), whole, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(pixels, again)
