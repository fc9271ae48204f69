"""Segmentation: scores by hand, windows and enlargement against plain forms, layouts, bad files, and heads that learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from patchlight.backbones.interface import MapLevel
from patchlight.backbones.vit import VisionTransformer
from patchlight.evaluation.encoder import Encoder, InputFormat
from patchlight.evaluation.features import Reading
from patchlight.evaluation.ranks import Ranks
from patchlight.evaluation.segment import windows
from patchlight.evaluation.segment.benchmark import draw_segments, evaluate_segment
from patchlight.evaluation.segment.crops import TrainingScenes, side_lengths
from patchlight.evaluation.segment.heads import SemanticFpnHead, UperNetHead
from patchlight.evaluation.segment.model import Segmenter, segmentation_loss
from patchlight.evaluation.segment.protocols import ConvSegment, FpnSegment, LinearSegment, UperNetSegment, head_name
from patchlight.evaluation.segment.scenes import IGNORE, Scene, Scenes, open_scenes
from patchlight.evaluation.segment.scores import confusion_of, scores_of
from patchlight.evaluation.segment.windows import best_class, predict, window_starts
from patchlight.heads.summary import ClassTokenSummary

CPU, READING = Ranks(torch.device("cpu")), Reading(workers=0)
SMALL = {"crop": 32, "test_short_side": 32, "warmup": 0, "colors": "none", "scales": (1.0, 1.0), "batch": 4}
BY_STEPS = {"epochs": 0, "warmup_epochs": 0, "area": None}


def small_encoder() -> Encoder:
    torch.manual_seed(0)
    vit = VisionTransformer(width=16, depth=4, heads=2, patch_size=4, image_size=32)
    return Encoder(vit, ClassTokenSummary(), "small", InputFormat(32))


class Halves:
    """Left of a random line class 0 in red, right of it class 1 in blue; class 2 is nowhere."""

    classes = 3

    def __init__(self, count: int) -> None:
        self.lines = 8 + 4 * np.arange(count) % 17

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, index: int) -> str:
        return f"halves {index}"

    def key(self, index: int) -> Path:
        return Path(f"halves-{index}")

    def read(self, index: int):
        truth = (np.arange(32)[None, :] >= self.lines[index]).astype(np.int64).repeat(32, 0)
        image = np.zeros((32, 32, 3), np.uint8)
        image[..., 0], image[..., 2] = 220 * (1 - truth), 220 * truth
        return Scene(image, truth)


def test_scores_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, IGNORE, 1]])
    found = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 1]])
    confusion = confusion_of(truth, found, 5)
    assert confusion[:3, :3].tolist() == [[1, 1, 0], [0, 3, 0], [1, 0, 1]]
    scores = scores_of(confusion)
    assert scores["mIoU"] == pytest.approx((1 / 3 + 3 / 4 + 1 / 2) / 3), "absent classes do not count"
    assert scores["mAcc"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert scores["aAcc"] == pytest.approx(5 / 7)
    with pytest.raises(ValueError, match="got none in all test scenes"):
        scores_of(torch.zeros(3, 3, dtype=torch.int64))


def test_scores_of_objects_by_hand():
    """Four pixels of objects, three found (one as another class), and two of the background taken for objects."""
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, IGNORE])
    found = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0, 1])
    scores = scores_of(confusion_of(truth, found, 4), background=True)
    precision, recall = 3 / 5, 3 / 4
    assert scores["fgIoU"] == pytest.approx(3 / 6)
    assert scores["fgF"] == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))
    assert scores["aAcc"] == pytest.approx(4 / 8), "classes still count in the other scores"
    nothing = scores_of(confusion_of(truth[:4], truth[:4], 4), background=True)
    assert (nothing["fgIoU"], nothing["fgF"]) == (1.0, 1.0)
    assert "fgF" not in scores_of(confusion_of(truth, found, 4))


def test_the_loss_leaves_unknown_pixels_out():
    maps, classes = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    classes[0, :4] = IGNORE
    scores = F.interpolate(maps, size=(8, 8), mode="bilinear").permute(0, 2, 3, 1)
    by_hand = -scores.log_softmax(-1)[classes != IGNORE].gather(1, classes[classes != IGNORE][:, None]).mean()
    assert segmentation_loss((maps,), classes, CPU) == pytest.approx(by_hand.item(), rel=1e-5)
    assert segmentation_loss((maps, maps), classes, CPU) == pytest.approx(1.4 * by_hand.item(), rel=1e-5)
    assert segmentation_loss((maps,), torch.full((2, 8, 8), IGNORE), CPU) == 0


def test_windows_cover_a_side():
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(300, 512, 341) == [0]
    assert window_starts(1000, 512, 341) == [0, 341, 488]


class Counting(torch.nn.Module):
    """A head that gives the n-th call the score n for class 1, and keeps the shapes that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.seen = small_encoder(), []

    def forward(self, window):
        self.seen.append(tuple(window.shape[-2:]))
        value = float(len(self.seen))
        return (torch.tensor([0.0, value])[None, :, None, None].expand(1, 2, 8, 8),)


def test_windows_are_averaged():
    model, protocol = Counting(), ConvSegment(crop=32, test_short_side=32, stride=16, test="windows")
    found = predict(model, np.zeros((32, 48, 3), np.uint8), protocol, torch.device("cpu"), "fp32")
    assert model.seen == [(32, 32), (32, 32)]
    assert found.shape == (32, 48)
    assert (found == 1).all()


def test_whole_images_are_only_resized():
    model, protocol = Counting(), ConvSegment(crop=8, test_short_side=30)
    assert protocol.test == "whole"
    assert predict(model, np.zeros((20, 44, 3), np.uint8), protocol, torch.device("cpu"), "fp32").shape == (20, 44)
    assert model.seen == [(30, 66)], "sides that patches do not divide are padded by the model"
    segmenter = Segmenter(small_encoder(), ConvSegment().build_head(small_encoder(), 3), "patches").eval()
    with torch.no_grad():
        odd, even = torch.randn(1, 3, 30, 66), torch.zeros(1, 3, 32, 68)
        even[..., :30, :66] = odd
        assert torch.equal(segmenter(odd)[0], segmenter(even)[0])


def test_long_images_are_resized_by_their_longer_side():
    assert side_lengths((100, 200), 512, 2048) == (512, 1024)
    assert side_lengths((1000, 100), 512, 2048) == (2048, 205)
    assert side_lengths((1000, 100), 512, 0) == (5120, 512)


def test_the_best_class_in_pieces_is_that_of_the_whole(monkeypatch):
    scores = torch.randn(11, 5, 7)
    whole = F.interpolate(scores[None], size=(23, 31), mode="bilinear")[0].argmax(0)
    monkeypatch.setattr(windows, "_MOST_SCORES", 2 * 23 * 31)
    assert torch.equal(best_class(scores, (23, 31)), whole)


def test_heads_give_scores_of_the_finest_scale():
    levels = [torch.randn(2, 8, 7, 5) for _ in range(4)]
    vit = [MapLevel(8, 16)] * 4
    assert SemanticFpnHead(vit, 3, 4)(levels)[0].shape == (2, 3, 28, 20)
    assert SemanticFpnHead(vit, 3, 4, pyramid=False)(levels)[0].shape == (2, 3, 7, 5)
    head = UperNetHead(vit, 3, 4, 6)
    scores, helper = head(levels)
    assert scores.shape == (2, 3, 28, 20)
    assert helper.shape == (2, 3, 7, 5)
    assert head.helper[0][0].weight.shape[:2] == (6, 8)
    assert len(head.eval()(levels)) == 1, "the helper is part of training only"


@pytest.mark.parametrize(
    "protocol",
    [
        LinearSegment(steps=60, rate=3e-2, stride=32, **SMALL),
        ConvSegment(steps=60, rate=3e-2, **SMALL, **BY_STEPS),
        FpnSegment(steps=40, rate=3e-3, channels=8, pyramid=True, **SMALL),
        FpnSegment(steps=60, optimizer="sgd", rate=3e-2, power=0.9, channels=8, **SMALL),
        UperNetSegment(steps=120, rate=3e-3, stride=32, channels=8, helper_channels=8, **SMALL),
    ],
    ids=lambda protocol: f"{head_name(protocol)} {protocol.optimizer}",
)
def test_every_head_learns(protocol):
    encoder = small_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    found = evaluate_segment(encoder, Scenes("halves", Halves(16), Halves(6)), protocol, CPU, READING)
    assert found.metrics["mIoU"] > 0.75
    assert "fgIoU" not in found.metrics
    assert found.absent == (2,)
    same = all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert same == protocol.frozen
    assert draw_segments(found.pictures).size == (3 * 256 + 8, 4 * 256 + 12)


def test_training_crops_keep_image_and_classes_together():
    torch.manual_seed(0)
    scaled = TrainingScenes(Halves(5), ConvSegment(crop=24, scales=(0.8, 2.0), colors="none", area=None))
    shared = TrainingScenes(Halves(5), ConvSegment(crop=24, area=(0.3, 1.0), colors="none"))
    for data, i in [(data, i) for data in (scaled, shared) for i in range(5)]:
        image, classes = data[i]
        assert image.shape == (3, 24, 24)
        assert classes.shape == (24, 24)
        known = classes != IGNORE
        blue = image[2].int() > image[0].int()
        assert (blue == (classes == 1))[known].double().mean() > 0.93, "but for a blurred column"


@pytest.mark.parametrize("colors", ["distort", "jitter", "none"])
def test_colors_change_as_asked(colors):
    torch.manual_seed(1)
    data = TrainingScenes(Halves(5), ConvSegment(crop=32, colors=colors, area=(1.0, 1.0)))
    images = torch.stack([data[i % 5][0] for i in range(20)])
    assert images.dtype == torch.uint8
    plain = {(220, 0, 0), (0, 0, 220)}
    found = {tuple(color) for color in images.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).tolist()}
    assert bool(found - plain) == (colors != "none")


def test_a_wrong_first_mask_is_found_before_training_and_later_ones_are_left_out(tmp_path):
    for part, count in (("training", 4), ("validation", 3)):
        for number in range(count):
            image, mask = np.full((16, 16, 3), 90, np.uint8), np.full((16, 16), 1 + number % 2, np.uint8)
            save(tmp_path / f"images/{part}/{number}.png", image)
            save(tmp_path / f"annotations/{part}/{number}.png", mask)
    save(tmp_path / "annotations/validation/1.png", np.ones((9, 16), np.uint8))
    save(tmp_path / "annotations/training/2.png", np.full((16, 16), 151, np.uint8))
    protocol = ConvSegment(**{**SMALL, **BY_STEPS, "steps": 2, "crop": 16, "test_short_side": 16})
    scenes = open_scenes("ade20k", str(tmp_path))
    with pytest.warns(UserWarning, match=r"validation/1.png cannot be read .*one size"):
        evaluate_segment(small_encoder(), scenes, protocol, CPU, READING)
    reasons = " ".join(scenes.unreadable.reasons.values())
    assert len(scenes.unreadable.reasons) == 2
    assert "must be below 150, got 150" in reasons
    save(tmp_path / "annotations/validation/0.png", np.ones((9, 16), np.uint8))
    with pytest.raises(ValueError, match="one size"):
        evaluate_segment(small_encoder(), open_scenes("ade20k", str(tmp_path)), protocol, CPU, READING)


def test_a_single_image_is_too_few_for_upernet():
    protocol = UperNetSegment(steps=1, channels=8, **SMALL)
    with pytest.raises(ValueError, match="two images or more per batch"):
        evaluate_segment(small_encoder(), Scenes("halves", Halves(1), Halves(1)), protocol, CPU, READING)


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)


def test_layouts(tmp_path):
    image = np.zeros((6, 8, 3), np.uint8)
    stored = np.arange(48).reshape(6, 8).astype(np.uint8)
    for part in ("training", "validation"):
        save(tmp_path / f"ade/images/{part}/a.jpg", image)
        save(tmp_path / f"ade/annotations/{part}/a.png", stored)
    ade = open_scenes("ade20k", str(tmp_path / "ade"))
    assert ade.classes == 150
    assert ade.test.read(0).classes.flatten()[:3].tolist() == [IGNORE, 0, 1]
    voc = tmp_path / "voc"
    save(voc / "JPEGImages/b.jpg", image)
    save(voc / "SegmentationClass/b.png", np.where(stored > 20, 255, stored).astype(np.uint8))
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    for name in ("train", "val"):
        (voc / f"ImageSets/Segmentation/{name}.txt").write_text("b\n")
    classes = open_scenes("voc2012", str(voc)).train.read(0).classes
    assert classes.max() == 20
    assert classes[-1, -1] == IGNORE
    for part in ("train-semi", "validation"):
        save(tmp_path / f"ins/{part}/n01/c.JPEG", image)
        colors = np.zeros((6, 8, 3), np.uint8)
        colors[0, 0], colors[1, 1] = (1, 0, 0), (1000 % 256, 1000 // 256, 0)
        save(tmp_path / f"ins/{part}-segmentation/n01/c.png", colors)
    scenes = open_scenes("imagenet-s", str(tmp_path / "ins"))
    assert (scenes.classes, scenes.name, scenes.background) == (2, "imagenet-s1", True)
    classes = scenes.test.read(0).classes
    assert (classes[0, 0], classes[1, 1], classes[2, 2]) == (1, IGNORE, 0)
    save(tmp_path / "ade/annotations/validation/a.png", stored[:5])
    with pytest.raises(ValueError, match=r"one size, got \(6, 8\) and \(5, 8\)"):
        ade.test.read(0)
    save(tmp_path / "ade/annotations/validation/a.png", np.full((6, 8), 200, np.uint8))
    with pytest.raises(ValueError, match="must be below 150, got 199"):
        ade.test.read(0)
    (tmp_path / "ade/annotations/training/a.png").unlink()
    with pytest.raises(FileNotFoundError, match="none for 1 of 1 images"):
        open_scenes("ade20k", str(tmp_path / "ade"))
    save(tmp_path / "ins/validation-segmentation/n01/c.png", stored)
    with pytest.raises(ValueError, match="must have colors"):
        open_scenes("imagenet-s", str(tmp_path / "ins")).test.read(0)
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(ValueError, match="list of images must name some"):
        open_scenes("voc2012", str(voc))
    with pytest.raises(ValueError, match="got 'coco'"):
        open_scenes("coco", str(tmp_path))


def test_procedural_scenes_have_true_masks():
    scenes = open_scenes("procedural", procedural_images=12)
    scene = scenes.train.read(3)
    label = scenes.train.source.labels[3] + 1
    assert set(np.unique(scene.classes)) == {0, label}
    inside, outside = scene.image[scene.classes == label], scene.image[scene.classes == 0]
    assert inside.mean() > outside.mean() + 20, "objects are brighter than the background"


def test_the_parts_of_imagenet_s_have_their_names(tmp_path):
    """SERE's tables differ by the number of classes."""
    for count, name in ((50, "imagenet-s50"), (919, "imagenet-s")):
        for part in ("train-semi", "validation"):
            for number in range(count):
                for path in (tmp_path / name / part, tmp_path / name / f"{part}-segmentation"):
                    (path / f"n{number:04d}").mkdir(parents=True)
                    (path / f"n{number:04d}" / "a.png").touch()
        scenes = open_scenes("imagenet-s", str(tmp_path / name))
        assert (scenes.name, scenes.classes) == (name, count + 1)
