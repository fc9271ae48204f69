"""Detectors: parts against plain forms, what they refuse, and that they learn, alone and on two processes."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.tiny_run import on_processes
from parity import SEED
from PIL import Image
from torchvision.ops import roi_align

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.vit import VisionTransformer
from patchlight.backbones.wrapped import wrap_backbone
from patchlight.evaluation.__main__ import main
from patchlight.evaluation.detect import benchmark
from patchlight.evaluation.detect.annotations import read_coco
from patchlight.evaluation.detect.benchmark import (
    FoundObjects,
    evaluate_detect,
    score_detector,
    staged_rate,
    train_detector,
)
from patchlight.evaluation.detect.model import Detector
from patchlight.evaluation.detect.pictures import draw_detections
from patchlight.evaluation.detect.protocols import CascadeDetect, MaskRcnnDetect, published_detect
from patchlight.evaluation.detect.stages import RoiPool, Stage
from patchlight.evaluation.detect.training_images import Sample, fitted, sample_of
from patchlight.evaluation.encoder import Encoder, InputFormat
from patchlight.evaluation.features import Reading
from patchlight.evaluation.layouts.coco import write_coco
from patchlight.evaluation.ranks import Ranks, join_ranks
from patchlight.evaluation.training import broadcast_weights
from patchlight.heads.summary import ClassTokenSummary

CPU, READING = Ranks(torch.device("cpu")), Reading(workers=0)
TINY = {"channels": 16, "hidden": 16, "proposals": 30, "samples": 16, "batch": 4, "warmup": 2, "anchor": 4,
        "short_sides": (48, 64), "crop_sides": (), "long_side": 80, "test_short_side": 64}  # fmt: skip
BOTH = pytest.mark.parametrize("kind", [MaskRcnnDetect, CascadeDetect], ids=["mask-rcnn", "cascade"])


def small_encoder() -> Encoder:
    torch.manual_seed(SEED)
    vit = VisionTransformer(width=16, depth=4, heads=2, patch_size=8, image_size=64)
    return Encoder(vit, ClassTokenSummary(), "small", InputFormat(64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco", images=8, size=64, seed=SEED)


def test_the_rate_rises_and_falls_in_steps():
    protocol = MaskRcnnDetect(rate=1.0, warmup=10)
    rates = [staged_rate(step, 20, protocol) for step in (0, 5, 10, 8 * 20 - 1, 8 * 20, 11 * 20)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01])


def test_published_settings_follow_schedule_and_data():
    assert published_detect(CascadeDetect, "1x", "COCO") == CascadeDetect()
    longer = published_detect(MaskRcnnDetect, "3x", "COCO")
    assert (longer.epochs, longer.milestones) == (36, (27, 33))
    assert replace(longer, epochs=12, milestones=(8, 11)) == MaskRcnnDetect()
    assert published_detect(MaskRcnnDetect, "1x", "procedural").channels < 256
    with pytest.raises(ValueError, match="schedule must be one of 1x, 3x"):
        published_detect(MaskRcnnDetect, "2x", "COCO")
    for wrong in ({"short_sides": ()}, {"crop": (600, 384)}, {"samples": 0}, {"least_score": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            MaskRcnnDetect(**wrong)


def test_boxes_take_the_map_of_their_size():
    """A map that holds each place's own coordinates: the middle of the features is the middle of the box."""
    x = (torch.arange(256) + 0.5).expand(1, 1, 256, 256)
    maps = [torch.nn.functional.avg_pool2d(x, stride) + 1000 * level for level, stride in enumerate((4, 8, 16, 32))]
    boxes = [torch.tensor([[8.0, 8, 24, 24], [8, 8, 120, 120], [16, 16, 239.9, 239.9], [32, 0, 256.5, 256]])]
    found = RoiPool(7)(maps, boxes)[:, 0]
    middles = found[:, 3, 3]
    assert (middles / 1000).floor().tolist() == [0, 1, 1, 2], "112 pixels and more take the second map, 224 the third"
    assert (middles % 1000).tolist() == pytest.approx([16, 64, 127.95, 144.25], abs=1)
    assert torch.allclose(found[:1], roi_align(maps[0], [boxes[0][:1]], 7, 0.25, 0, True)[:, 0])
    assert RoiPool(7)(maps, [torch.zeros(0, 4)]).shape == (0, 1, 7, 7)


def test_a_stage_of_the_cascade_moves_boxes_by_the_changes_of_their_class():
    stage = Stage(1, CascadeDetect(**TINY), classes=2)
    boxes = torch.tensor([[0.0, 0, 10, 20], [10, 10, 30, 30]])
    changes = torch.zeros(2, 3, 4)
    changes[0, 2, 0] = 20 * 0.1  # right by a tenth of the width: stage two counts in twentieths
    changes[1, 1, 3] = 10 * torch.tensor(2.0).log()  # twice as high
    (found,) = stage.improved([boxes], changes.flatten(1), torch.tensor([2, 1]), [(35, 100)])
    assert found.tolist() == [pytest.approx([1, 0, 11, 20]), pytest.approx([10, 0, 30, 35])]  # inside the image


@BOTH
def test_right_scores_and_boxes_cost_nothing(kind):
    """A stage that already finds the true boxes and classes has no loss but that of its masks."""
    protocol = kind(**TINY)
    stage = Stage(0, protocol, classes=2)
    target = {"boxes": torch.tensor([[4.0, 4, 20, 24]]), "labels": torch.tensor([2]), "masks": torch.zeros(1, 32, 32)}
    target["masks"][0, 4:24, 4:12] = 1  # its left half
    inside = torch.tensor([[4.0, 4, 20, 24]])
    stage.score = lambda maps, boxes: (torch.eye(3)[[2] * len(boxes[0])] * 1e3, torch.zeros(len(boxes[0]), 12))
    left = torch.where(torch.arange(28) < 14, 1e3, -1e3).expand(1, 3, 28, 28)
    stage.masks = lambda maps, boxes: left.expand(len(boxes[0]), -1, -1, -1)
    losses, better = stage.losses([], [inside], [target], [(32, 32)])
    assert {name: float(loss) for name, loss in losses.items()} == {"class": 0, "box": 0, "mask": 0}
    assert better[0].shape == (0, 4), "true boxes come anew in the next stage"


def test_mirrored_and_cut_objects_stay_with_their_image(folder):
    """The bounds of each mask are its box, after every change, but for rounding."""
    torch.manual_seed(SEED)
    data = read_coco(str(folder))
    whole = sample_of(data.train.images[0])
    assert torch.equal(whole.mirrored().mirrored().image, whole.image)
    assert torch.equal(whole.mirrored().mirrored().boxes, whole.boxes)
    cut = 0
    for item in range(len(data.train)):
        sample = sample_of(data.train.images[item]).mirrored().resized(80, 100).cut(40, 60)
        assert 40 <= min(sample.image.shape[1:]) <= max(sample.image.shape[1:]) <= 60
        cut += len(sample.boxes)
        for box, mask in zip(sample.boxes.tolist(), sample.masks, strict=True):
            rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
            if len(rows):  # a sliver of a box may hold nothing of its mask
                bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert np.abs(np.array(bounds) - box).max() <= 20, "parts of an object may be cut away from its box"
                assert mask.sum() == mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].sum()
                inside = mask[max(0, int(box[1]) - 1) : int(box[3]) + 2, max(0, int(box[0]) - 1) : int(box[2]) + 2]
                assert inside.sum() == mask.sum(), "no mask reaches out of its box"
    assert cut > 0
    assert fitted((100, 200), 80, 120) == (60, 120)
    assert fitted((100, 200), 80, 320) == (80, 160)


def test_an_image_without_objects_can_be_trained_on():
    torch.manual_seed(SEED)
    detector = Detector(small_encoder(), CascadeDetect(**TINY), classes=3).train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
             "masks": torch.zeros(0, 40, 48, dtype=torch.uint8)}  # fmt: skip
    losses = detector.losses([torch.zeros(3, 40, 48, dtype=torch.uint8)], [empty], "fp32")
    assert losses["mask"] == losses["box"] == 0
    sum(losses.values()).backward()
    unused = {name.split(".")[0] for name, p in detector.named_parameters() if p.grad is None}
    assert unused <= {"encoder"}, "every rank has gradients of the same parts"


def test_a_crop_may_leave_no_object():
    sample = Sample(torch.zeros(3, 40, 40, dtype=torch.uint8), torch.tensor([[0.0, 0, 2, 2]]), torch.ones(1),
                    torch.zeros(1, 40, 40, dtype=torch.uint8))  # fmt: skip
    torch.manual_seed(SEED)
    counts = {len(sample.cut(4, 6).resized(48, 80).boxes) for _ in range(50)}
    assert 0 in counts


BACKBONES = {
    "swin": lambda: build_backbone("swin_tiny", image_size=64, depth=2),
    "resnet": lambda: build_backbone("resnet18", stem_width=8),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_other_backbones(name):
    torch.manual_seed(SEED)
    encoder = Encoder(BACKBONES[name](), ClassTokenSummary(), name, InputFormat(64))
    detector = Detector(encoder, MaskRcnnDetect(**TINY), classes=3)
    target = {"boxes": torch.tensor([[4.0, 4, 20, 24]]), "labels": torch.tensor([2]),
              "masks": torch.ones(1, 64, 80, dtype=torch.uint8)}  # fmt: skip
    images = [torch.randint(0, 255, (3, 64, 80), dtype=torch.uint8)] * 2
    losses = detector.losses(images, [target] * 2, "fp32")
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        found = detector.eval().found(images[:1], "bf16")[0]
    assert found["masks"].shape[1:] == (1, 28, 28)


def test_a_backbone_of_one_map_is_refused():
    backbone = wrap_backbone(torch.nn.Conv2d(3, 8, 16, 16), 64)
    encoder = Encoder(backbone, ClassTokenSummary(), "one map", InputFormat(64))
    with pytest.raises(ValueError, match="need a backbone with four feature maps"):
        Detector(encoder, MaskRcnnDetect(**TINY), classes=3)


@BOTH
def test_training_lowers_the_loss(kind, folder):
    data = read_coco(str(folder))
    protocol = kind(**TINY, epochs=16, milestones=(15,), rate=3e-3, drop_path=0.0)
    torch.manual_seed(SEED)
    losses = train_detector(Detector(small_encoder(), protocol, 10), data, protocol, CPU, READING)
    assert len(losses) == 16 * (len(data.train) // 4)
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:3])


def trained_on_a_rank(root: str) -> tuple[dict, dict, dict]:
    """Weights before the first rank's are taken, weights after it, and scores."""
    protocol, data = CascadeDetect(**TINY, epochs=1, least_score=0.0, detections=10), read_coco(root)
    with join_ranks("cpu") as ranks:
        model = Detector(small_encoder(), protocol, 10)
        broadcast_weights(model, ranks)
        torch.manual_seed(ranks.rank)
        train_detector(model, data, protocol, ranks, READING)
        own = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
        broadcast_weights(model, ranks)
        result = score_detector(model, data, protocol, ranks, READING)
        return own, {name: x.numpy().copy() for name, x in model.state_dict().items()}, result.metrics


def test_two_processes_train_one_model_and_test_every_image_once(folder):
    first, second = on_processes(2, trained_on_a_rank, str(folder))
    assert first[0].keys() == second[0].keys()
    assert all(np.array_equal(x, second[0][name]) for name, x in first[0].items())
    assert second[2] == {}, "the first rank scores"
    protocol, data = CascadeDetect(**TINY, epochs=1, least_score=0.0, detections=10), read_coco(str(folder))
    model = Detector(small_encoder(), protocol, 10)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in first[1].items()})
    assert score_detector(model, data, protocol, CPU, READING).metrics == pytest.approx(first[2], abs=1e-6)


def test_the_truth_fed_as_predictions_has_the_highest_score(folder, monkeypatch):
    """The whole path of testing: found objects of each image, in its pixels, to scores of 1."""
    data, protocol = read_coco(str(folder)), MaskRcnnDetect(**TINY)
    true = iter(data.test.images)

    def found(*_) -> FoundObjects:
        image = next(true)
        single = ~image.objects.crowd
        masks = [mask for mask, keep in zip(image.masks(), single, strict=True) if keep]
        masks = [{**mask, "counts": mask["counts"].decode()} if isinstance(mask["counts"], bytes) else mask
                 for mask in masks]  # fmt: skip
        return FoundObjects(image.objects.boxes[single], image.objects.classes[single], np.ones(single.sum()), masks)

    monkeypatch.setattr(benchmark, "found_in", found)
    result = score_detector(Detector(small_encoder(), protocol, 10), data, protocol, CPU, READING)
    assert result.metrics == dict.fromkeys(result.metrics, pytest.approx(1))
    assert len(result.metrics) == 6
    assert draw_detections(result.pictures).size == (2 * 320 + 4, 4 * 320 + 3 * 4)


def test_unreadable_images_are_named_and_left_out(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bad")
    data = read_coco(str(tmp_path / "bad"))
    data.train.images[0].path.unlink()
    Image.new("RGB", (64, 60)).save(data.test.images[1].path)
    protocol = MaskRcnnDetect(**TINY, epochs=1)
    with pytest.warns(UserWarning, match="cannot be read"):
        result = evaluate_detect(small_encoder(), data, protocol, CPU, READING)
    assert len(result.metrics) == 6, "the others are scored"
    assert len(data.unreadable.reasons) == 2
    (note,) = data.unreadable.notes(CPU)
    assert note.startswith("2 images could not be read and were left out, or replaced in training: ")


def call(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, words)])
    main()


def flags(options: dict) -> list[str]:
    """The options of a protocol as they are typed."""
    words: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values or ["none"])]
    return words


def test_from_the_command_line(run_folder, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "render", "coco", tmp_path / "drawn", "--images", 4, "--size", 64)
    command = "detect", "--checkpoint", run_folder, "mask-rcnn", "--data", tmp_path / "drawn", "--reading.workers", 1
    call(monkeypatch, *command, *flags({**TINY, "epochs": 1}), "--schedule", "3x")
    result = json.loads((run_folder / "evaluation/detect-mask-rcnn-drawn.json").read_text())
    assert result["metrics"].keys() == {f"{k} {m}" for k in ("box", "mask") for m in ("AP", "AP50", "AP75")}
    assert result["changed"]["epochs"] == [12, 1]  # no paper has a longer one than 1x
    assert result["changed"]["milestones"] == [[8, 11], [27, 33]]
    assert result["protocol"]["milestones"] == [27, 33]
    assert (run_folder / "evaluation/detect-mask-rcnn-drawn/objects.png").exists()
    assert "box AP" in (run_folder / "report.html").read_text()
    with pytest.raises(SystemExit, match="schedule must be one of 1x, 3x, got '9x'"):
        call(monkeypatch, *command, "--schedule", "9x")
    with pytest.raises(SystemExit, match="needs a file instances_train2017"):
        call(monkeypatch, "detect", "--checkpoint", run_folder, "cascade", "--data", tmp_path)
    with pytest.raises(SystemExit, match="One of mask-rcnn, cascade must be named"):
        call(monkeypatch, "detect", "--checkpoint", run_folder)
    with pytest.raises(SystemExit, match="got cocoo; perhaps coco"):
        call(monkeypatch, "render", "cocoo", tmp_path / "new")
    capsys.readouterr()
    call(monkeypatch, "render", "--help")
    assert "davis" in capsys.readouterr().out
