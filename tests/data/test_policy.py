"""Crop policies and the tables drawn from them."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from patchlight.data.policy import (
    CropPolicy,
    CropSpec,
    Photometric,
    dino_policy,
    ibot_policy,
    pqcl_policy,
    sample_crops,
    selfpatch_policy,
)


def draw(policy: CropPolicy, images: int = 500, epoch: int = 0, seed: int = 0, size: tuple[int, int] = (500, 375)):
    return sample_crops(policy, seed, epoch, np.arange(images), np.tile(size, (images, 1)))


@pytest.mark.parametrize(
    ("policy", "views", "scales"),
    [
        (dino_policy(), (2, 8), ((0.4, 1.0), (0.05, 0.4))),
        (selfpatch_policy(), (2, 8), ((0.25, 1.0), (0.05, 0.25))),
        (ibot_policy(), (2, 0), ((0.14, 1.0), None)),
        (ibot_policy(10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)), (2, 10), ((0.25, 1.0), (0.05, 0.25))),
    ],
)
def test_published_policies(policy, views, scales):
    tables = draw(policy)
    assert tuple(len(tables[kind].box) if kind in tables else 0 for kind in ("global_crops", "local_crops")) == views
    for (kind, table), scale, size in zip(tables.items(), scales, (224, 96), strict=False):
        area = table.box[..., 2] * table.box[..., 3] / (500 * 375)
        ratio = table.box[..., 2] / table.box[..., 3]
        assert table.size == size, kind
        assert scale[0] * 0.98 < area.min() < scale[0] * 1.2
        assert scale[1] * 0.8 < area.max() <= scale[1] * 1.02
        assert ratio.min() > 3 / 4 * 0.97
        assert ratio.max() < 4 / 3 * 1.03


def test_published_probabilities():
    tables = draw(dino_policy(), images=4000)
    one, two = (lambda name, v=v: getattr(tables["global_crops"], name)[v] for v in (0, 1))
    local = tables["local_crops"]

    def near(values, probability):
        return abs(values.mean() - probability) <= 5 * np.sqrt(probability * (1 - probability) / values.size)

    assert near(one("sigma") > 0, 1.0)
    assert near(two("sigma") > 0, 0.1)
    assert near(local.sigma > 0, 0.5)
    assert near(one("solarize"), 0.0)
    assert near(two("solarize"), 0.2)
    assert near(local.solarize, 0.0)
    for table in tables.values():
        assert near(table.flip, 0.5)
        assert near(table.gray, 0.2)
        assert near(table.brightness != 1, 0.8)
        changed = table.brightness != 1
        for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2)):
            values = getattr(table, name)
            assert np.array_equal(values != 1, changed), "one coin for all four"
            assert low <= values.min() < low + 0.01 < high - 0.01 < values.max() <= high
        assert -0.1 <= table.hue.min() < -0.099 < 0.099 < table.hue.max() <= 0.1
        assert 0.1 <= table.sigma[table.sigma > 0].min() < 0.11
        assert 1.99 < table.sigma.max() <= 2.0
        assert set(np.unique(table.order)) == set(range(24))


def test_boxes_follow_torchvisions_law():
    """Two-sample Kolmogorov-Smirnov distances against RandomResizedCrop, which draws the same four numbers."""
    policy = CropPolicy((CropSpec(1, 8, (0.05, 1.0)),))
    ours = draw(policy, images=6000)["global_crops"].box[0].astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.05, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)], float)
    theirs = theirs[:, [1, 0, 3, 2]]  # top, left, height, width -> x, y, w, h

    def features(box):
        return [box[:, 0], box[:, 1], box[:, 2] * box[:, 3], box[:, 2] / box[:, 3], box[:, 0] + box[:, 2]]

    for a, b in zip(features(ours), features(theirs), strict=True):
        grid = np.sort(np.concatenate([a, b]))
        distance = abs(
            np.searchsorted(np.sort(a), grid, "right") / len(a) - np.searchsorted(np.sort(b), grid, "right") / len(b)
        ).max()
        assert distance < 1.63 * np.sqrt(2 / 6000), "1 % level"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (40, 4)])
def test_boxes_stay_inside_of_any_image(size):
    box = draw(dino_policy(), images=50, size=size)["local_crops"].box
    assert (box[..., :2] >= 0).all()
    assert (box[..., 2:] >= 1).all()
    assert (box[..., 0] + box[..., 2] <= size[0]).all()
    assert (box[..., 1] + box[..., 3] <= size[1]).all()


def test_a_wide_image_falls_back_to_the_widest_allowed_center():
    box = draw(CropPolicy((CropSpec(1, 8, (0.9, 1.0)),)), images=5, size=(400, 30))["global_crops"].box
    assert (box == [180, 0, 40, 30]).all()


def test_rows_depend_on_seed_epoch_and_id_alone():
    policy = dino_policy(3)
    whole = draw(policy, images=40)
    some = np.array([31, 4, 17])
    part = sample_crops(policy, 0, 0, some, np.tile((500, 375), (3, 1)))
    for kind, table in part.items():
        for name in ("box", "flip", "brightness", "hue", "order", "sigma"):
            assert np.array_equal(getattr(table, name), getattr(whole[kind], name)[:, some]), (kind, name)
    for other in (draw(policy, 40, epoch=1), draw(policy, 40, seed=1)):
        assert (other["local_crops"].box != whole["local_crops"].box).any(-1).mean() > 0.99
    views = whole["local_crops"].box
    assert (views[0] != views[1]).any(-1).mean() > 0.99
    assert (whole["global_crops"].box[0] != views[0]).any(-1).mean() > 0.99


@pytest.mark.parametrize("asymmetric", [True, False], ids=["paper", "release"])
def test_query_crops_are_a_kind_of_their_own_and_never_mirrored(asymmetric):
    policy = pqcl_policy(3, 32, (0.05, 0.4), (0.5, 2.0), asymmetric=asymmetric)
    tables = draw(policy, images=2000)
    assert list(tables) == ["global_crops", "query_crops"]
    assert policy.pixels_per_image == 2 * 224**2 + 3 * 32**2
    queries, (first, second) = tables["query_crops"], tables["global_crops"].sigma > 0
    assert queries.box.shape == (3, 2000, 4)
    assert not queries.flip.any()
    assert not queries.solarize.any()
    assert abs((queries.sigma > 0).mean() - 0.5) < 0.03
    ratio = queries.box[..., 2] / queries.box[..., 3]
    assert 0.5 * 0.97 < ratio.min() < 0.6
    assert 1.7 < ratio.max() < 2 * 1.03
    assert first.all()
    assert abs(second.mean() - (0.1 if asymmetric else 1.0)) < 0.03
    assert abs(tables["global_crops"].solarize[1].mean() - (0.2 if asymmetric else 0.0)) < 0.04


def test_wrong_policies_are_named():
    with pytest.raises(ValueError, match="at least one global crop"):
        CropPolicy(())
    with pytest.raises(ValueError, match=r"local_crops must share one size, got \[96, 64\]"):
        CropPolicy(
            (CropSpec(1, 224, (0.4, 1)),), local_crops=(CropSpec(1, 96, (0.1, 0.4)), CropSpec(1, 64, (0.1, 0.4)))
        )


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            lambda: CropSpec(1, 224, (0.5, 0.2)),
            r"CropSpec.scale must be 2 ascending numbers, got \(0.5, 0.2\); correct",
        ),
        (lambda: CropSpec(1, 224, (0.0, 0.2)), r"CropSpec.scale\[0\] must be a number in \(0, 1\], got 0.0"),
        (lambda: CropSpec(1, 224, (0.5, NAN)), r"CropSpec.scale\[1\] must be .* got nan"),
        (lambda: CropSpec(1, 224, 0.5), r"CropSpec.scale must be 2 ascending numbers, got 0.5"),
        (lambda: CropSpec(1, 224, (0.4, 1), (0.75, INF)), r"CropSpec.ratio\[1\] must be .* got inf"),
        (lambda: CropSpec(2.0, 224, (0.4, 1)), r"CropSpec.count must be a whole number .* got 2.0; leave"),
        (lambda: CropSpec(True, 224, (0.4, 1)), r"CropSpec.count must be a whole number .* got True"),
        (lambda: CropSpec(1, "224", (0.4, 1)), r"CropSpec.size must be a whole number .* got '224'"),
        (lambda: CropSpec(1, 224, (0.4, 1), flip=1.5), r"CropSpec.flip must be a number in \[0, 1\], got 1.5"),
        (
            lambda: Photometric(jitter=NAN),
            r"Photometric.jitter must be a number in \[0, 1\], got nan; the default is 0.8",
        ),
        (lambda: Photometric(solarize=-0.1), r"Photometric.solarize must be .* got -0.1"),
        (lambda: Photometric(brightness="0.4"), r"Photometric.brightness must be a number .* got '0.4'"),
        (lambda: Photometric(hue=0.6), r"Photometric.hue must be a number in \[0, 0.5\], got 0.6"),
        (lambda: Photometric(blur_sigma=(0.1, 5)), r"Photometric.blur_sigma\[1\] must be a number in \(0, 4\], got 5"),
        (lambda: Photometric(blur_sigma=(2.0, 0.1)), r"Photometric.blur_sigma must be 2 ascending numbers"),
        (lambda: CropPolicy((CropSpec(1, 8, (1, 1)),), mean=(0, NAN, 0)), r"CropPolicy.mean\[1\] must be .* got nan"),
        (lambda: CropPolicy((CropSpec(1, 8, (1, 1)),), std=(1, 1, 0)), r"CropPolicy.std\[2\] must be .* got 0"),
        (lambda: CropPolicy((CropSpec(1, 8, (1, 1)),), std=(1, 1)), r"CropPolicy.std must be 3 numbers, got \(1, 1\)"),
        (lambda: dino_policy(local_count=-1), r"CropSpec.count must be a whole number .* got -1"),
    ],
)
def test_wrong_numbers_are_named(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong()


def test_right_numbers_are_accepted():
    """At the ends of their ranges, and of numpy's types."""
    sharp = Photometric(1, 1.0, 0, 1, 0.5, 1, 0, (4, 4), np.float64(1))
    spec = CropSpec(np.int64(3), 8, (1, 1), (1, 1), 1, sharp)
    assert CropPolicy((spec,), mean=(-1, 0, 1), std=(1e-3, 1, 2)).pixels_per_image == 3 * 64
