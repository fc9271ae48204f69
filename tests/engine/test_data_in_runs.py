"""Whole runs on files: each loader, a folder with a bad file, resuming with the same images, the loader printed."""

import json
from dataclasses import replace

import pytest
import torch
from data.pictures import write_pictures
from engine.tiny_run import tiny_run
from PIL import Image

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


def test_a_labeled_folder_with_bad_files_is_evaluated_without_them(tmp_path):
    names = [f"{'ab'[number % 2]}/{number:02}.jpg" for number in range(40)]
    write_pictures(tmp_path / "images", names)
    for name in names[:3]:
        (tmp_path / "images" / name).write_bytes(b"")
    folder = tmp_path / "run"
    output = {"folder": str(folder), "evaluate_every": 4}
    with pytest.warns(UserWarning, match="cannot be read") as warned:
        train(run_over(tmp_path / "images", folder, "torchvision", output=output, data={"most_bad": 0.2}))
    left_out = {
        name for name in names for w in warned if f"{name} cannot be read" in (s := str(w.message)) and "left out" in s
    }
    assert left_out == set(names[:3])
    lines = [json.loads(line) for line in (folder / "knn.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert all(0 <= line["k10"] <= 1 for line in lines)


def test_a_run_that_is_resumed_names_changed_files(images, tmp_path):
    first = build_trainer(run_over(images, tmp_path / "run", "torchvision", data={"workers": 0}))
    first.step()
    first.save()
    first.checkpoints.finish()
    (images / "07.jpg").write_bytes((images / "08.jpg").read_bytes())
    run = run_over(images, tmp_path / "run", "torchvision", data={"workers": 0})
    second = build_trainer(replace(run, output=replace(run.output, resume=True)))
    with pytest.warns(UserWarning, match=r"not what they were .* of 32 files .* such as .*07.jpg"):
        second.begin()


@pytest.mark.parametrize("loader", ["torchvision", pytest.param("dali", marks=needs_dali)])
def test_an_image_of_too_many_pixels_is_replaced(images, tmp_path, loader):
    Image.new("RGB", (300, 200)).save(images / "09.jpg")
    folder = tmp_path / "run"
    output = {"folder": str(folder), "evaluate_every": 0}
    train(run_over(images, folder, loader, output=output, data={"most_pixels": 50_000, "most_bad": 0.2}))
    reasons = dict(line.split("\t") for line in (folder / "bad_files.tsv").read_text().splitlines())
    assert reasons[str(images / "09.jpg")] == "ValueError: the image has 300 x 200 pixels; 1 to 50000 are read"
