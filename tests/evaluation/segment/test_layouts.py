"""Procedural data in the layouts of real data sets, predictions in the formats of servers, and fine-tuned networks."""

import json
import shutil

import numpy as np
import pytest
from parity import SEED
from PIL import Image

from patchlight.data.procedural import CLASSES, ProceduralSource
from patchlight.evaluation.__main__ import main
from patchlight.evaluation.layouts.scenes import write_ade20k, write_imagenet_s, write_voc2012
from patchlight.evaluation.segment.predictions import Predictions, as_stored
from patchlight.evaluation.segment.scenes import ProceduralScenes, open_scenes, open_unmasked

WRITERS = {"ade20k": write_ade20k, "voc2012": write_voc2012, "imagenet-s": write_imagenet_s}
FLAGS = ["--steps", "1", "--epochs", "0", "--warmup-epochs", "0", "--crop", "16", "--test-short-side", "16"]
FLAGS += ["--batch", "4", "--reading.workers", "0"]


@pytest.mark.parametrize("layout", WRITERS)
def test_readers_read_what_was_written(tmp_path, layout):
    root = WRITERS[layout](tmp_path / "a folder", images=20, size=32, seed=SEED)
    scenes = open_scenes(layout, str(root), "trainaug")
    for part, number, count in ((scenes.train, 0, 20), (scenes.test, 1, 10)):
        truth = ProceduralScenes(ProceduralSource(count, 32, 3 * SEED + number))
        assert len(part) == count
        names = [str(part.key(i)) for i in range(count)]
        order = sorted(range(count), key=lambda i: int(names[i][-6:]))  # ImageNet-S is in folders of classes
        for i, place in enumerate(order):
            found, written = part.read(place), truth.read(i)
            assert (found.classes == written.classes).all()
            assert np.abs(found.image.astype(int) - written.image).mean() < 12, "but for JPEG"
    assert scenes.classes == {"ade20k": 150, "voc2012": 21, "imagenet-s": 1 + len(CLASSES)}[layout]
    unmasked = open_unmasked(layout, str(root))
    assert len(unmasked) == 10
    assert unmasked.image(3).shape == (32, 32, 3)


def test_writers_refuse_what_cannot_be(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="must be new or empty"):
        write_voc2012(tmp_path)
    with pytest.raises(ValueError, match="each of the 10 classes, got 9 images"):
        write_imagenet_s(tmp_path / "new", images=9)


@pytest.mark.parametrize("layout", WRITERS)
def test_predictions_are_stored_as_masks_are(tmp_path, layout):
    """What is written as a prediction and read as a mask is the same."""
    root = WRITERS[layout](tmp_path / "data", images=10, size=16, seed=SEED)
    top = {"ade20k": 150, "voc2012": 21, "imagenet-s": 920}[layout]
    classes = np.random.default_rng(SEED).integers(0, top, (16, 16))
    path = Predictions(tmp_path / "out", layout).save(open_unmasked(layout, str(root)).key(0), classes)
    scenes = open_scenes(layout, str(root))
    with Image.open(path) as image:
        assert (scenes.train.classes_of(np.array(image)) == classes).all()
        assert image.size == (16, 16)


def test_formats_of_servers():
    classes = np.array([[0, 1, 20], [3, 2, 1]])
    assert np.array(as_stored(classes, "ade20k")).tolist() == [[1, 2, 21], [4, 3, 2]]
    voc = as_stored(classes, "voc2012")
    assert voc.mode == "P"
    assert np.array(voc.convert("RGB"))[0].tolist() == [[0, 0, 0], [128, 0, 0], [0, 64, 128]], "VOC's own colors"
    ids = as_stored(np.array([[0, 300, 919]]), "imagenet-s")
    assert np.array(ids)[0].tolist() == [[0, 0, 0], [44, 1, 0], [151, 3, 0]]


@pytest.mark.parametrize(
    ("layout", "name"), [("imagenet-s", "n00000003/*.png"), ("voc2012", "2009_*.png"), ("ade20k", "ADE_testing_*.png")]
)
def test_the_test_split_is_predicted_for_its_server(run_folder, tmp_path, layout, name):
    root = WRITERS[layout](tmp_path / "data", images=10, size=32, seed=SEED)
    words = ["segment", "conv", "--checkpoint", str(run_folder), "--layout", layout, "--data", str(root), *FLAGS]
    out = tmp_path / "results"
    main([*words, "--split", "test", "--predictions", str(tmp_path / "server"), "--out", str(out)])
    written = sorted((tmp_path / "server").rglob("*.png"))
    unmasked = open_unmasked(layout, str(root))
    assert [p.relative_to(tmp_path / "server").with_suffix("") for p in written] == [
        unmasked.key(i) for i in range(len(unmasked))
    ]
    assert list((tmp_path / "server").glob(name))
    (result,) = [json.loads(p.read_text()) for p in out.glob("*.json")]
    assert result["details"]["predictions"] == str(tmp_path / "server")
    assert result["data"] == {"imagenet-s": "imagenet-s10"}.get(layout, layout)
    with pytest.raises(SystemExit, match="must be new or empty"):
        main([*words, "--predictions", str(tmp_path / "server"), "--out", str(out)])
    shutil.rmtree(root / {"ade20k": "images/testing", "voc2012": "ImageSets", "imagenet-s": "test"}[layout])
    with pytest.raises(ValueError if layout != "voc2012" else FileNotFoundError, match=r"test split|must list"):
        open_unmasked(layout, str(root))


def test_scored_predictions_are_the_files(run_folder, tmp_path):
    """Without --split the files are those of val, and give the same score again."""
    root = write_voc2012(tmp_path / "data", images=10, size=32, seed=SEED)
    words = ["segment", "conv", "--checkpoint", str(run_folder), "--layout", "voc2012", "--data", str(root), *FLAGS]
    main([*words, "--predictions", str(tmp_path / "files"), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/segment-conv-voc2012.json").read_text())
    scenes = open_scenes("voc2012", str(root))
    right = [
        np.array(Image.open(tmp_path / f"files/{scenes.test.key(i)}.png")) == scenes.test.read(i).classes
        for i in range(len(scenes.test))
    ]
    assert np.mean(right) == pytest.approx(result["metrics"]["aAcc"])


def test_a_fine_tuned_network_has_results_of_its_own(run_folder, tmp_path, monkeypatch):
    """SERE's ImageNet-S_FT: what the folder of `finetune --save` says of itself is in the name of the data."""
    root = write_imagenet_s(tmp_path / "data", images=10, size=16, seed=SEED)
    monkeypatch.setattr("patchlight.evaluation.__main__.facts_of", lambda _: {"finetuned": {"data": "imagenet"}})
    words = ["segment", "conv", "--checkpoint", str(run_folder), "--layout", "imagenet-s", "--data", str(root), *FLAGS]
    main([*words, "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/segment-conv-imagenet-s10-ft.json").read_text())
    assert result["data"] == "imagenet-s10-ft"
    assert "the network was fine-tuned on labels first" in result["notes"]
