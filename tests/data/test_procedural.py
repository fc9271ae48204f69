"""The generated images: reproducible, with exact masks, and with no class that color alone could predict."""

import numpy as np
import pytest

from patchlight.data.procedural import CLASSES, ProceduralSource, draw_images


@pytest.fixture(scope="module")
def source():
    return ProceduralSource(600, size=48, seed=3)


def test_an_image_is_a_function_of_seed_and_index(source):
    again, _ = draw_images(3, np.array([417, 5]), 48)
    assert np.array_equal(again, source.images[[417, 5]])
    assert (draw_images(4, np.array([5]), 48)[0] != source.images[5]).mean() > 0.5
    assert np.array_equal(ProceduralSource(7, size=48, seed=3).images, source.images[:7]), "whatever the count"
    assert (source.images[1:] != source.images[:-1]).any((1, 2, 3)).all()


def test_every_class_is_there_equally_often(source):
    assert np.bincount(source.labels, minlength=len(CLASSES)).tolist() == [60] * len(CLASSES)
    assert source.labels[:10].tolist() != source.labels[10:20].tolist()
    assert source.classes == CLASSES
    assert len(source) == 600


def test_masks_are_where_the_objects_are(source):
    """Fills and inks are bright where the background is dark: brightness must follow the mask, in every class."""
    for number, name in enumerate(CLASSES):
        indices = np.nonzero(source.labels == number)[0][:20]
        masks, gray = source.masks(indices), source.images[indices].mean(-1)
        assert masks.dtype == bool
        assert 0.1 < masks.mean() < 0.6, name
        gap = np.median([g[m].mean() - g[~m].mean() for g, m in zip(gray, masks, strict=True)])
        assert gap > 25, f"{name}: {gap}"
        flat = source.images[indices].astype(int)
        step = np.abs(np.diff(flat, axis=2)).sum(-1)
        border = masks[:, :, 1:] != masks[:, :, :-1]
        assert step[border].mean() > 2 * step[~border & ~masks[:, :, 1:]].mean(), f"{name}: edges at the mask's rim"


def test_masks_do_not_fit_other_images(source):
    indices = np.arange(100)
    masks, gray = source.masks(indices), source.images[indices].mean(-1)
    right = np.mean([g[m].mean() - g[~m].mean() for g, m in zip(gray, masks, strict=True)])
    wrong = np.mean([g[m].mean() - g[~m].mean() for g, m in zip(gray, np.roll(masks, 1, 0), strict=True)])
    assert wrong < 0.3 * right


def nearest_class_mean(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of the class whose training mean is nearest, on the second half of the images."""
    half = len(labels) // 2
    scaled = (features - features[:half].mean(0)) / (features[:half].std(0) + 1e-6)
    means = np.stack([scaled[:half][labels[:half] == c].mean(0) for c in range(len(CLASSES))])
    nearest = ((scaled[half:, None] - means[None]) ** 2).sum(-1).argmin(1)
    return float((nearest == labels[half:]).mean())


def test_color_does_not_predict_the_class(source):
    flat = source.images.reshape(len(source), -1, 3).astype(float)
    channel_means = flat.mean(1)
    opponent = np.stack([flat[..., 0] - flat[..., 1], flat[..., 1] - flat[..., 2]], -1)
    hues = np.concatenate([channel_means - channel_means.mean(1, keepdims=True), opponent.std(1)], 1)
    assert nearest_class_mean(hues, source.labels) < 0.25, "chance is 0.1"
    assert nearest_class_mean(np.eye(len(CLASSES))[source.labels], source.labels) == 1.0, "the measure can find a class"


def test_sizes(source):
    assert source.images.shape == (600, 48, 48, 3)
    assert source.images.dtype == np.uint8
    assert ProceduralSource(2, size=31).read(1).shape == (31, 31, 3)
    with pytest.raises(ValueError, match="size 16 or more, got 4 and 8"):
        ProceduralSource(4, size=8)
