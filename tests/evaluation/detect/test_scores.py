"""Average precision: by hand, against a plain form, with crowd regions, and 1 for the truth itself."""

import numpy as np
import pytest
from parity import SEED

from patchlight.evaluation.detect.annotations import read_part
from patchlight.evaluation.detect.scores import average_precisions, true_objects
from patchlight.evaluation.layouts.coco import runs_of, write_coco

SIDE = 100


def mask_of(box):
    left, top, width, height = box
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + height, left : left + width] = True
    return {"size": [SIDE, SIDE], "counts": runs_of(mask)}


def truth_of(rows):
    """rows: (image, category, box, crowd)."""
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": int(crowd),
         "area": box[2] * box[3], "segmentation": mask_of(box)}
        for number, (image, category, box, crowd) in enumerate(rows, 1)
    ]  # fmt: skip
    images = [{"id": id, "height": SIDE, "width": SIDE} for id in range(1, 5)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 2, "name": "a"}, {"id": 5, "name": "b"}],
    }


def found_of(rows):
    """rows: (image, category, box, score)."""
    return [{"image_id": i, "category_id": c, "bbox": list(map(float, b)), "score": s, "segmentation": mask_of(b)}
            for i, c, b, s in rows]  # fmt: skip


def test_by_hand():
    """Two objects; the best find is right, the second wrong, the third covers 72 % of the other object.

    Up to an overlap of 0.7 precision is 1 for the 51 recalls of 0 to 0.5, and 2/3 for the other 50; above, 1 for 51 of 101.
    """
    truth = truth_of([(1, 2, [0, 0, 10, 10], False), (2, 2, [20, 20, 10, 10], False)])
    found = found_of([(1, 2, [0, 0, 10, 10], 0.9), (1, 2, [50, 50, 10, 10], 0.8), (2, 2, [20, 20, 8, 9], 0.7)])
    metrics, by_class = average_precisions(truth, found)
    loose, strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    for kind in ("box", "mask"):
        assert metrics[f"{kind} AP50"] == pytest.approx(loose)
        assert metrics[f"{kind} AP75"] == pytest.approx(strict)
        assert metrics[f"{kind} AP"] == pytest.approx((loose + strict) / 2)
        assert by_class[f"{kind} AP"] == {"a": pytest.approx((loose + strict) / 2)}, "the other class is in no image"


def test_finds_in_crowds_do_not_count():
    """A find inside a crowd region is no mistake; the same find elsewhere is."""
    rows = [(1, 2, [0, 0, 10, 10], False), (1, 2, [40, 40, 30, 30], True)]
    best = found_of([(1, 2, [45, 45, 5, 5], 0.95), (1, 2, [0, 0, 10, 10], 0.9)])
    assert average_precisions(truth_of(rows), best)[0]["box AP"] == pytest.approx(1)
    assert average_precisions(truth_of(rows[:1]), best)[0]["box AP"] == pytest.approx(0.5)


def overlap(found, true, crowd):
    corners = np.minimum(found[0] + found[2], true[0] + true[2]), np.minimum(found[1] + found[3], true[1] + true[3])
    common = max(0, corners[0] - max(found[0], true[0])) * max(0, corners[1] - max(found[1], true[1]))
    return common / (found[2] * found[3] + (0 if crowd else true[2] * true[3] - common))


def plain_ap(truth, found, least):
    """The mean over classes, by the definition: finds in order of score take the best free object; crowds absorb the rest."""
    scores = []
    for category in (2, 5):
        objects = [row for row in truth if row[1] == category]
        wanted, taken, hits = sum(not row[3] for row in objects), set(), []
        if not wanted:
            continue
        for image, _, box, _ in sorted((r for r in found if r[1] == category), key=lambda r: -r[3]):
            free = [(overlap(box, row[2], row[3]), n) for n, row in enumerate(objects) if row[0] == image]
            single = [f for f in free if f[0] >= least and f[1] not in taken and not objects[f[1]][3]]
            if single:
                taken.add(max(single)[1])
                hits.append(1)
            elif not any(f[0] >= least and objects[f[1]][3] for f in free):
                hits.append(0)
        right = np.cumsum(hits)
        recall, precision = right / wanted, right / np.arange(1, len(hits) + 1)
        tops = [max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)]
        scores.append(np.mean(tops))
    return np.mean(scores)


@pytest.mark.parametrize("draw", range(3))
def test_against_a_plain_form(draw):
    random = np.random.default_rng((SEED, draw))
    truth, found = [], []
    for image in range(1, 5):
        for _ in range(5):
            box, category = (
                [int(v) for v in (*random.integers(0, 60, 2), *random.integers(8, 40, 2))],
                int(random.choice([2, 5])),
            )
            truth.append((image, category, box, bool(random.random() < 0.15)))
            near = [max(1, v + int(d)) for v, d in zip(box, random.integers(-4, 5, 4), strict=True)]
            found.append((image, category, near, float(random.random())))
            other = [int(v) for v in (*random.integers(0, 60, 2), *random.integers(8, 40, 2))]
            found.append((image, int(random.choice([2, 5])), other, float(random.random())))
    metrics, _ = average_precisions(truth_of(truth), found_of(found))
    expected = [plain_ap(truth, found, least) for least in np.linspace(0.5, 0.95, 10)]
    assert metrics["box AP"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert metrics["box AP50"] == pytest.approx(expected[0], abs=1e-9)
    assert metrics["box AP75"] == pytest.approx(expected[5], abs=1e-9)
    assert metrics["mask AP"] == pytest.approx(metrics["box AP"], abs=1e-9), "masks fill their boxes"


def test_the_truth_itself_has_the_highest_score(tmp_path):
    part = read_part(write_coco(tmp_path / "coco", images=4, size=64, seed=SEED), "train2017")
    truth = true_objects(part, part.images)
    found = [
        {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": 0.9,
         "segmentation": row["segmentation"]}
        for row in truth["annotations"] if not row["iscrowd"]
    ]  # fmt: skip
    assert average_precisions(truth, found)[0] == {name: pytest.approx(1) for name in average_precisions(truth, [])[0]}
    assert set(average_precisions(truth, [])[0].values()) == {0.0}
    with pytest.raises(ValueError, match="need a test image with an object"):
        average_precisions({**truth, "annotations": []}, [])
