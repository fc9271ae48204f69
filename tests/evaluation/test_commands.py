"""The commands from the command line: numbers in a JSON file and in the run's report, protocols, errors for bad input."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from patchlight.data.procedural_video import write_davis
from patchlight.evaluation.__main__ import main
from patchlight.evaluation.checkpoints import open_checkpoint
from patchlight.evaluation.features import Reading, encode
from patchlight.evaluation.paper_numbers import all_paper_numbers, paper_numbers
from patchlight.evaluation.probes.knn import KnnProtocol, evaluate_knn, knn_accuracy
from patchlight.evaluation.probes.labeled import choose_labels, open_labeled
from patchlight.evaluation.ranks import Ranks
from patchlight.evaluation.results import changed_fields

CPU = Ranks(torch.device("cpu"))


def call(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, words)])
    main()


@pytest.fixture
def images(tmp_path):
    """Three classes of colors in two parts."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for c, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (20, 24, 3)).astype(np.uint8)
                pixels[..., 2 - c] += 120
                Image.fromarray(pixels).save(folder / f"{part}{c}{i}.png")
    return tmp_path / "images"


def test_knn_from_the_command_line(run_folder, images, monkeypatch, capsys):
    call(
        monkeypatch,
        "knn",
        "--checkpoint",
        run_folder,
        "--data",
        images,
        "--reading.workers",
        0,
        "--protocol.k",
        1,
        5,
        99,
    )
    result = json.loads((run_folder / "evaluation" / "knn-images.json").read_text())
    assert result["metrics"].keys() == {"k1", "k5"}
    assert result["metrics"]["k1"] == 1.0, "even an untrained backbone separates colors"
    assert result["protocol"]["temperature"] == 0.07
    assert result["changed"] == {"k": [[10, 20, 100, 200], [1, 5, 99]]}
    assert result["environment"]["packages"]["torch"]
    assert result["notes"] == ["k=[99] left out: there are 18 training images"]
    report = (run_folder / "report.html").read_text()
    assert "knn on" in report
    assert "k1 100%" in report
    assert "No published number" in capsys.readouterr().out


def test_streamed_knn_is_that_of_the_whole(run_folder):
    encoder, data = open_checkpoint(str(run_folder)), open_labeled("procedural", 64)
    protocol, reading = KnnProtocol(k=(3, 20)), Reading(batch=10, workers=0)
    streamed = evaluate_knn(encoder, data, protocol, CPU, reading)
    train, test = (encode(encoder, p, CPU, reading, 16, 16, data.unreadable)[0] for p in (data.train, data.test))
    labels = [torch.from_numpy(part.labels) for part in (data.train, data.test)]
    assert streamed == {f"k{k}": v for k, v in knn_accuracy(train, labels[0], test, labels[1], (3, 20)).items()}


def test_davis_from_the_command_line(run_folder, tmp_path, monkeypatch, capsys):
    videos = write_davis(tmp_path / "videos", videos=2, frames=4, size=32)
    call(monkeypatch, "davis", "--checkpoint", run_folder, "--data", videos, "--protocol.short-side", 32)
    result = json.loads((run_folder / "evaluation" / "davis-videos.json").read_text())
    assert 0 < result["metrics"]["J&F"] < 1
    assert len(result["details"]["objects"]) == 6
    assert (run_folder / "evaluation/davis-videos/procedural-001.webp").exists()
    (videos / "Annotations/480p/procedural-001/00000.png").unlink()
    with pytest.raises(SystemExit, match="1 that failed"):
        call(monkeypatch, "davis", "--checkpoint", run_folder, "--data", videos, "--protocol.short-side", 32)
    kept = json.loads((run_folder / "evaluation" / "davis-videos.json").read_text())
    assert len(kept["details"]["objects"]) == 3, "the other sequence's scores are kept"
    assert "procedural-001" in kept["failed"]
    assert "the first frame must have a mask" in capsys.readouterr().out


def test_render_refuses_a_full_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit, match="must be new or empty"):
        call(monkeypatch, "render", "davis", tmp_path)


def test_labels_that_do_not_match_are_named(images, monkeypatch, run_folder):
    (images / "train" / "violet").mkdir()
    with pytest.raises(SystemExit, match=r"1 empty folders in .*'violet'"):
        call(monkeypatch, "knn", "--checkpoint", run_folder, "--data", images)
    Image.new("RGB", (20, 20)).save(images / "train" / "violet" / "v.png")
    with pytest.raises(SystemExit, match=r"1 without a test image .*'violet'"):
        call(monkeypatch, "knn", "--checkpoint", run_folder, "--data", images)
    with pytest.raises(SystemExit, match="got no train in"):
        call(monkeypatch, "knn", "--checkpoint", run_folder, "--data", images / "train")


def test_a_share_of_labels(images, tmp_path):
    train = open_labeled(str(images)).train
    third = choose_labels(train, 1 / 3)
    assert np.bincount(third.labels).tolist() == [2, 2, 2]
    assert all(str(label) in third.name(i)[-6] for i, label in enumerate(third.labels)), "labels stay with their images"
    assert len(choose_labels(train, 0.001)) == 3, "a label per class at least"
    names = tmp_path / "names.txt"
    names.write_text("train00.png\ntrain13.png\ntrain25.png\n")
    assert choose_labels(train, 1, str(names)).labels.tolist() == [0, 1, 2]
    names.write_text("train00.png\ntrain01.png\n")
    with pytest.raises(ValueError, match="none for 2 classes, such as 'green'"):
        choose_labels(train, 1, str(names))
    names.write_text("train00.png\nother.png\n")
    with pytest.raises(ValueError, match="got 1 of 2"):
        choose_labels(train, 1, str(names))


def test_a_list_of_labels_names_its_share(run_folder, images, tmp_path, monkeypatch):
    names = tmp_path / "names.txt"
    names.write_text("train00.png\ntrain13.png\ntrain25.png\n")
    monkeypatch.setattr("patchlight.evaluation.__main__.train_classifier", lambda *_: None)
    monkeypatch.setattr("patchlight.evaluation.__main__.evaluate_classifier", lambda *_: {"top1": 0.5})
    for words in (["semi", "--names", names], ["semi", "--share", 0.5], ["finetune"]):
        call(monkeypatch, *words, "--checkpoint", run_folder, "--data", images)
    found = sorted(path.name for path in (run_folder / "evaluation").glob("finetune*"))
    assert found == ["finetune-16.7%-images.json", "finetune-50%-images.json", "finetune-images.json"]


def test_no_more_readers_than_processors():
    """torch warns of more at every evaluation."""
    assert 1 <= Reading().workers <= min(4, len(os.sched_getaffinity(0)))


def test_published_numbers():
    dino = next(row for row in paper_numbers("davis", "davis2017") if row.method == "DINO")
    assert dino.metrics == {"J&F": 60.7, "J_mean": 59.1, "F_mean": 62.4}
    assert not paper_numbers("davis", "my videos")
    rows = [r for r in all_paper_numbers() if not r.ablation]
    assert len({(r.task, r.data, r.method, r.backbone, r.epochs, r.source) for r in rows}) == len(rows)
    assert not changed_fields(KnnProtocol())
