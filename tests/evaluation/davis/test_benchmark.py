"""DAVIS: scores by hand, a whole folder from frames to numbers, and errors that name what is wrong with a folder."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from patchlight.data.procedural_video import draw_video, write_davis
from patchlight.evaluation.davis.benchmark import DavisProtocol, evaluate_davis
from patchlight.evaluation.davis.folder import DavisFolder, read_labels
from patchlight.evaluation.davis.resizing import frame_size
from patchlight.evaluation.davis.scores import (
    contour,
    contour_accuracy,
    dilated,
    region_similarity,
    score_frames,
    statistics,
)
from patchlight.evaluation.encoder import Encoder, InputFormat
from patchlight.evaluation.ranks import Ranks
from patchlight.heads.summary import MeanSummary
from patchlight.records import Tokens

CPU = Ranks(torch.device("cpu"))


class Colors(torch.nn.Module):
    """A backbone whose features are the colors of a patch."""

    width, patch_size, heads, has_class_token, blocks = 48, 4, 1, False, (None,)

    def forward(self, pixels, layers=()):
        patches = torch.nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2)
        grid = pixels.shape[-2] // 4, pixels.shape[-1] // 4
        return Tokens(None, patches, grid, (patches,) * len(layers))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_davis(tmp_path_factory.mktemp("videos") / "set", videos=3, frames=6, size=64)


def evaluate(root, tmp_path):
    encoder = Encoder(Colors(), MeanSummary(), "colors", InputFormat(64))
    return evaluate_davis(encoder, DavisFolder(root), DavisProtocol(short_side=64), CPU, tmp_path / "out", previews=1)


def test_dilation_is_a_disk():
    mask = torch.rand(23, 31).numpy() > 0.97
    for radius in (0, 1, 3, 8, 40):
        y, x = np.nonzero(mask)
        rows, columns = np.mgrid[:23, :31]
        near = (((rows[..., None] - y) ** 2 + (columns[..., None] - x) ** 2) <= radius**2).any(-1)
        assert (dilated(mask, radius) == near).all(), radius


def test_scores_by_hand():
    truth, result = np.zeros((2, 40, 40), bool)
    truth[10:20, 10:20], result[10:20, 12:22] = True, True
    assert region_similarity(truth, result) == 80 / 120
    void = np.zeros_like(truth)
    void[:, 20:] = True
    assert region_similarity(truth, result, void) == 80 / 100
    assert contour_accuracy(truth, truth) == 1
    assert contour_accuracy(truth, np.roll(truth, 1, 0)) == 1, "one pixel lies within reach"
    assert contour_accuracy(truth, np.roll(truth, 20, 0)) == 0
    assert contour_accuracy(truth, np.zeros_like(truth)) == 0
    assert np.count_nonzero(contour(truth)) == 4 * 10, "an outline around the upper left half, once per side"
    falling = statistics(np.linspace(1, 0, 100))
    assert falling.recall == 0.5
    assert falling.decay == pytest.approx(0.75, abs=0.02)
    assert statistics(np.r_[np.ones(300), np.zeros(300)]).decay == 1, "also for more than 256 frames"


def test_videos_hold_what_they_must():
    images, labels = draw_video(0, 1, 24, 64)
    again, _ = draw_video(0, 1, 24, 64)
    assert (images == again).all()
    assert images.shape == (24, 64, 64, 3)
    assert set(np.unique(labels[0])) == {0, 1, 2, 3}, "every object is in the first frame"
    centers = [np.argwhere(labels[t] == 1).mean(0) for t in (0, 23)]
    assert np.abs(centers[0] - centers[1]).max() > 3, "it moves"
    inside = [images[t][labels[t] == 1].mean(0) for t in (0, 12)]
    assert np.abs(inside[0] - inside[1]).max() < 25, "the mask follows the object's color"
    with pytest.raises(ValueError, match="got 2 of 64"):
        draw_video(0, 0, 2, 64)


def test_a_folder_from_frames_to_scores(videos, tmp_path):
    found = evaluate(videos, tmp_path)
    assert not found.failed
    assert len(found.scores) == 3
    assert 0.5 < found.metrics()["J&F"] < 0.99, "colors find objects, but not their outlines"
    assert len(found.per_object()) == 9
    saved = np.stack([read_labels(p) for p in sorted((tmp_path / "out/masks/procedural-001").glob("*.png"))])
    truth = np.stack([read_labels(p) for p in sorted((videos / "Annotations/480p/procedural-001").glob("*.png"))])
    assert np.array_equal(score_frames(truth[1:-1], saved[1:-1]).j, found.scores["procedural-001"].j)
    assert (saved[0] == truth[0]).all()
    with Image.open(tmp_path / "out/procedural-000.webp") as preview:
        assert preview.n_frames == 6
    assert (tmp_path / "out/procedural-000.png").exists()
    assert not (tmp_path / "out/procedural-001.png").exists(), "previews of the first sequence only"


def break_size(root):
    path = root / "JPEGImages/480p/procedural-001/00003.jpg"
    Image.open(path).resize((50, 64)).save(path)


def break_mask_size(root):
    path = root / "Annotations/480p/procedural-001/00003.png"
    Image.open(path).resize((50, 64)).save(path)


def remove_mask(root):
    (root / "Annotations/480p/procedural-001/00003.png").unlink()


def remove_first_mask(root):
    (root / "Annotations/480p/procedural-001/00000.png").unlink()


def add_object(root):
    path = root / "Annotations/480p/procedural-001/00004.png"
    labels = read_labels(path)
    labels[:5, :5] = 7
    Image.fromarray(labels).save(path)


def rename_mask(root):
    path = root / "Annotations/480p/procedural-001/00005.png"
    path.rename(path.with_name("99999.png"))


def paint_mask(root):
    path = root / "Annotations/480p/procedural-001/00000.png"
    Image.open(path).convert("RGB").save(path)


def cut_file(root):
    path = root / "JPEGImages/480p/procedural-001/00002.jpg"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_size, r"frames and masks must have one size, got \(64, 50\) for 00003.jpg and \(64, 64\)"),
        (break_mask_size, r"got \(64, 50\) for the mask of 00003.jpg"),
        (remove_mask, "got none for 1 of 6 frames, such as 00003"),
        (remove_first_mask, "the first frame must have a mask"),
        (add_object, "got object 7 from 00004.jpg on"),
        (rename_mask, "got 99999.png without a frame"),
        (paint_mask, "got mode RGB"),
        (cut_file, "00002.jpg"),
    ],
)
def test_a_damaged_sequence_is_named_and_the_others_are_scored(videos, tmp_path, damage, sentence):
    root = shutil.copytree(videos, tmp_path / "copy")
    damage(root)
    found = evaluate(root, tmp_path)
    assert set(found.scores) == {"procedural-000", "procedural-002"}
    assert list(found.failed) == ["procedural-001"]
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(found.failed["procedural-001"])


def test_first_masks_alone_are_enough_to_segment(videos, tmp_path):
    root = shutil.copytree(videos, tmp_path / "copy")
    for path in (root / "Annotations/480p").rglob("*.png"):
        if path.stem != "00000":
            path.unlink()
    found = evaluate(root, tmp_path)
    assert not found.failed
    assert not found.scores
    assert len(found.unscored) == 3
    assert len(list((tmp_path / "out/masks").rglob("*.png"))) == 18


def test_what_is_no_davis_folder_is_named(videos, tmp_path):
    with pytest.raises(FileNotFoundError, match="got no JPEGImages"):
        DavisFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="got 'train' where there are val"):
        _ = DavisFolder(videos, "train").names


def test_frame_sizes():
    assert frame_size(480, 854, 480, 16) == (480, 832), "as the released code has DAVIS"
    assert frame_size(854, 480, 480, 8) == (832, 480)
    assert frame_size(480, 854, 480, 14) == (476, 854 // 14 * 14)
    assert frame_size(64, 64, 64, 8) == (64, 64)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b", "..", ".", "a\\b", "c:name", "a\0b"])
def test_a_list_cannot_name_what_lies_outside_of_the_folder(name, videos, tmp_path):
    root = tmp_path / "data" / "set"
    shutil.copytree(videos, root)
    for part in ("JPEGImages", "Annotations"):  # the frames exist there
        shutil.copytree(root / part / "480p" / "procedural-000", root / part / "escaped")
    (root / "ImageSets").mkdir(exist_ok=True)
    for path in (root / "ImageSets").rglob("*.txt"):
        path.unlink()
    (root / "ImageSets" / "val.txt").write_text(f"procedural-000 {name}\n")
    with pytest.raises(
        ValueError, match=r"A sequence must be the name of a folder, not a path, got .* in .*val.txt; "
    ) as error:
        evaluate(root, tmp_path)
    assert repr(name) in str(error.value)
    assert not list(tmp_path.glob("out*")), "nothing is written"


def test_names_that_are_no_list_are_refused(videos, tmp_path):
    for options in ({"split": "../val"}, {"resolution": "/etc"}):
        with pytest.raises(ValueError, match="must be the name of a folder, not a path"):
            DavisFolder(videos, **options)
    root = tmp_path / "set"
    shutil.copytree(videos, root)
    (root / "ImageSets").mkdir(exist_ok=True)
    for path in (root / "ImageSets").rglob("*.txt"):
        path.unlink()
    (root / "ImageSets" / "val.txt").write_text("procedural-000 procedural-001 procedural-000")
    with pytest.raises(ValueError, match="each sequence once, got procedural-000 more than once in"):
        _ = DavisFolder(root).names
    (root / "ImageSets" / "val.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"must be UTF-8 text, got .* at byte 0 of .*val.txt"):
        _ = DavisFolder(root).names


def test_a_damaged_mask_is_named(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("L", (64, 64)).save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:50], b"text", whole[:20] + bytes(30)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a readable PNG, got \w+: .* for .*mask.png; repair it"):
            read_labels(path)
    with pytest.raises(ValueError, match=r"DavisProtocol.std\[1\] must be a number in \(0, .* got 0"):
        DavisProtocol(std=(1, 0, 1))
