"""Unreadable images in evaluations: left out or replaced, named, counted in the result; the rest gives the same numbers."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from patchlight.evaluation.__main__ import main


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of colors in two parts, with one bad file in each; and the same without the bad files."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for part, count in (("train", 6), ("val", 3)):
        for c, name in enumerate(("blue", "green", "red")):
            folder = root / "good" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (20, 24, 3)).astype(np.uint8)
                pixels[..., 2 - c] += 120
                Image.fromarray(pixels).save(folder / f"{part}{c}{i}.png")
    shutil.copytree(root / "good", root / "bad")
    (root / "bad/train/green/train1x.png").write_bytes(b"")
    whole = (root / "good/val/red/val20.png").read_bytes()
    (root / "bad/val/blue/val0x.png").write_bytes(whole[: len(whole) // 2])
    return root


def result_of(monkeypatch, folder, task: str, *words) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluation", words[0], "--out", str(folder), *map(str, words[1:])])
    main()
    return json.loads(next(folder.glob(f"{task}-*.json")).read_text())


NOTE = "2 images could not be read and were left out, or replaced in training: "


@pytest.mark.parametrize("workers", [0, 1])
def test_knn_leaves_them_out(run_folder, images, tmp_path, monkeypatch, workers):
    results = []
    for name in ("good", "bad"):
        command = "knn", "--checkpoint", run_folder, "--data", images / name, "--protocol.k", 1, 5, 18
        results.append(
            result_of(monkeypatch, tmp_path / name, "knn", *command, "--reading.workers", workers, "--reading.batch", 4)
        )
    good, bad = results
    assert bad["metrics"] == good["metrics"]
    assert not [note for note in good["notes"] if "could not be read" in note]
    assert [
        note for note in bad["notes"] if note.startswith(NOTE) and "train1x.png (ValueError: the file is empty" in note
    ]


@pytest.mark.parametrize(
    ("command", "task"), [("linear", "linear"), ("finetune", "finetune"), ("semi --share 1", "finetune")]
)
def test_training_replaces_them_and_testing_leaves_them_out(
    run_folder, images, tmp_path, monkeypatch, capsys, command, task
):
    words = *command.split(), "--checkpoint", run_folder, "--data", images / "bad", "--protocol.epochs", 5
    options = ["--protocol.layers", 1] if command == "linear" else ["--protocol.warmup-epochs", 1]
    result = result_of(monkeypatch, tmp_path, task, *words, "--reading.workers", 0, "--protocol.batch", 4, *options)
    assert any(note.startswith(NOTE) for note in result["notes"])
    assert NOTE in capsys.readouterr().out
    top1 = result["metrics"]["top1"] * 9
    assert abs(top1 - round(top1)) < 1e-9, "nine test images are counted, not ten"


def test_nothing_readable_is_an_error(run_folder, images, tmp_path, monkeypatch):
    shutil.copytree(images / "good", tmp_path / "none")
    for path in (tmp_path / "none/val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="needs readable images, got none of 9; look at the warnings above"):
        result_of(monkeypatch, tmp_path, "knn", "knn", "--checkpoint", run_folder, "--data", tmp_path / "none")


def test_pictures_and_relations_leave_them_out(run_folder, images, tmp_path, monkeypatch):
    path = images / "bad/train"
    words = "attention", "--checkpoint", run_folder, "--data", path, "--out", tmp_path, "--protocol.images", 19
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, words)])
    with pytest.warns(UserWarning, match=r"train1x.png cannot be read .*; it is left out"):
        main()
    words = "relations", "--checkpoint", run_folder, "--data", path, "--protocol.heads", 2, "--protocol.images", 19
    with pytest.warns(UserWarning, match="took its place"):
        result = result_of(monkeypatch, tmp_path, "relations", *words)
    assert "1 images could not be read; others took their place" in result["notes"]


def test_segmentation_leaves_them_out(run_folder, images, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / part).mkdir(parents=True)
        for number in range(5):
            image, mask = random.integers(0, 255, (32, 32, 3)), random.integers(0, 3, (32, 32))
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "ade/images" / part / f"{number}.png")
            Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "ade/annotations" / part / f"{number}.png")
    (tmp_path / "ade/images/training/2.png").write_bytes(b"")
    (tmp_path / "ade/annotations/validation/3.png").write_bytes(b"no image")
    words = (
        "segment",
        "--checkpoint",
        run_folder,
        "--layout",
        "ade20k",
        "--data",
        tmp_path / "ade",
        "--reading.workers",
        0,
    )
    options = "linear", "--steps", 6, "--crop", 16, "--batch", 2, "--test-short-side", 16, "--stride", 8
    result = result_of(monkeypatch, tmp_path / "out", "segment", *words, *options)
    assert any(note.startswith(NOTE) for note in result["notes"])
