"""The scenes of the study: a function of seed and number, with true maps, in which colors tell nothing of classes and parts."""

import numpy as np
import pytest
from bench.creatures import CLASSES, KINDS, draw, draw_sheet, draw_video

SIZE = 48


@pytest.fixture(scope="module")
def scenes():
    return draw(7, np.arange(160), SIZE)


def test_a_scene_depends_on_seed_and_number_alone(scenes):
    alone = draw(7, np.array([5]), SIZE)
    for name in ("images", "objects", "classes", "parts"):
        assert np.array_equal(getattr(alone, name)[0], getattr(scenes, name)[5]), name
    assert alone.labels[0] == scenes.labels[5]
    assert not np.array_equal(draw(8, np.array([5]), SIZE).images, alone.images)


def test_maps_agree(scenes):
    assert scenes.images.shape == (160, SIZE, SIZE, 3)
    assert ((scenes.objects > 0) == (scenes.parts > 0)).all()
    assert (scenes.objects[scenes.classes > 0] > 0).all(), "what has a class is an object"
    assert set(np.unique(scenes.parts)) == set(range(len(KINDS) + 1))
    assert set(np.unique(scenes.classes)) == set(range(len(CLASSES) + 1)) == {*range(11)}
    for classes, objects, label in zip(scenes.classes, scenes.objects, scenes.labels, strict=True):
        assert (classes[objects == 1] == label + 1).all(), "the first object is of the image's class"
    shown = (scenes.classes == scenes.labels[:, None, None] + 1).mean((1, 2))
    assert (shown > 0.03).all() and 0.08 < shown.mean() < 0.4


def nearest_mean(features: np.ndarray, labels: np.ndarray) -> float:
    """How often the nearest of the classes' means, of the first half, is right on the second half."""
    half = len(features) // 2
    means = np.stack([features[:half][labels[:half] == c].mean(0) for c in np.unique(labels)])
    found = np.unique(labels)[((features[half:, None] - means) ** 2).sum(-1).argmin(1)]
    return float((found == labels[half:]).mean())


def test_colors_tell_little(scenes):
    colors = scenes.images.reshape(160, -1, 3).astype(float)
    summary = np.concatenate([colors.mean(1), colors.std(1)], 1)
    assert nearest_mean(summary, scenes.labels) < 0.3, "chance is 0.1"
    pixels, parts = scenes.images.reshape(-1, 3).astype(float), scenes.parts.reshape(-1)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(parts))[:20_000]
    assert nearest_mean(pixels[chosen], parts[chosen]) < 0.25, "chance is 0.125"


def test_videos_move_hide_and_show_again():
    videos = [draw_video(3, number, 24, SIZE) for number in range(3)]
    for video in videos:
        assert set(np.unique(video.objects[0])) == {0, 1, 2, 3}, "the first frame shows what is followed"
        areas = np.stack([(video.objects == k).mean((1, 2)) for k in (1, 2, 3)])
        assert (np.abs(np.diff(video.images.astype(int), axis=0)).mean((1, 2, 3)) > 1).all()
        assert areas[:, 0].min() > 0.01
    again = draw_video(3, 1, 24, SIZE)
    assert np.array_equal(again.images, videos[1].images)
    hidden = [
        (v.objects == k).mean((1, 2)).min() / (v.objects == k).mean((1, 2)).max() for v in videos for k in (1, 2, 3)
    ]
    assert min(hidden) < 0.6, "objects pass in front of each other"


def test_a_sheet_is_drawn(tmp_path):
    draw_sheet(tmp_path / "sheet.png", size=32, columns=2)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
