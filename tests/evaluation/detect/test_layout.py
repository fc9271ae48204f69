"""COCO's layout: what is written is what was drawn, what is read is what was written, and bad input is named and left out."""

import json

import numpy as np
import pytest
import torch
from parity import SEED
from PIL import Image

from patchlight.data.procedural import CLASSES
from patchlight.data.procedural_scenes import draw_scene
from patchlight.evaluation.detect import annotations
from patchlight.evaluation.detect.annotations import open_coco, read_coco, read_part
from patchlight.evaluation.detect.masks import decoded_masks, encoded_mask, pasted_masks
from patchlight.evaluation.detect.scores import true_objects
from patchlight.evaluation.layouts.coco import CATEGORY_IDS, polygons_of, runs_of, write_coco

SIZE = 64


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("with space") / "coco", images=20, size=SIZE, seed=SEED)


@pytest.fixture
def small(tmp_path):
    """A data set of one training and one test image of 20 x 10 pixels, and its annotations, to be changed."""
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / part / "a.png")
    square = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 1, 4, 3], "area": 12, "iscrowd": 0}
    square["segmentation"] = [[2, 1, 6, 1, 6, 4, 2, 4]]
    facts = {
        "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 10}],
        "annotations": [square],
        "categories": [{"id": 9, "name": "late"}, {"id": 3, "name": "early"}],
    }
    return tmp_path, facts


def save(root, facts, parts=("train2017", "val2017")):
    (root / "annotations").mkdir(exist_ok=True)
    for part in parts:
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(facts))
    return root


def test_what_is_read_is_what_was_drawn(written):
    data = read_coco(str(written))
    assert data.train.category_ids == CATEGORY_IDS
    assert data.train.class_names == CLASSES
    seen = {"crowd": 0, "polygons": 0, "runs": 0, "compressed": 0}
    part = read_part(written, "train2017")
    assert len(part) == 20
    for image in part.images:
        pixels, objects = draw_scene(2 * SEED, image.id, SIZE)
        assert np.abs(image.read().astype(int) - pixels).mean() < 4, "but for JPEG"
        assert image.objects.classes.tolist() == [thing.label for thing in objects]
        assert image.objects.crowd.tolist() == [thing.group for thing in objects]
        masks = image.decoded_masks()
        for thing, mask, box, stored in zip(objects, masks, image.objects.boxes, image.objects.masks, strict=True):
            assert np.array_equal(mask.astype(bool), thing.mask)
            rows, columns = np.nonzero(thing.mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            stored = json.loads(stored)
            counts = None if isinstance(stored, list) else stored["counts"]
            seen["polygons" if counts is None else "runs" if isinstance(counts, list) else "compressed"] += 1
            seen["crowd"] += thing.group
    assert min(seen.values()) > 0, f"{seen}: every form is drawn"
    assert [len(image.objects.masks) for image in part.images].count(0) >= 2, "some images are empty"
    assert len(data.train) < len(part)
    assert any("have no object to train on and are left out" in note for note in data.notes)


def test_drawing_again_gives_the_same(written, tmp_path):
    again = write_coco(tmp_path / "again", images=20, size=SIZE, seed=SEED)
    for path in written.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(written)).read_bytes(), path
    with pytest.raises(ValueError, match="must be new or empty"):
        write_coco(again)


def test_the_procedural_data_is_drawn_and_removed(monkeypatch):
    monkeypatch.setattr(annotations, "PROCEDURAL_IMAGES", 4)
    with open_coco("procedural") as data:
        path = data.test.images[0].path
        assert path.exists()
        assert data.name == "procedural"
    assert not path.exists()


def test_masks_by_hand():
    mask = np.array([[0, 1, 1], [1, 1, 0]], bool)
    assert runs_of(mask) == [1, 4, 1]
    assert polygons_of(np.ones((2, 3), bool)) == [[0, 0, 3, 0, 3, 2, 0, 2]]
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    assert polygons_of(ring) == [], "a hole has no polygon"
    both = [encoded_mask({"size": [2, 3], "counts": [1, 4, 1]}, 2, 3), encoded_mask(polygons_of(mask), 2, 3)]
    assert all(np.array_equal(m, mask) for m in decoded_masks(both, 2, 3).astype(bool))
    assert decoded_masks([], 2, 3).shape == (0, 2, 3)


def test_predicted_masks_are_pasted_into_their_boxes():
    boxes = torch.tensor([[2.0, 1, 6, 5], [10, 0, 20, 10], [9.7, 3.2, 21, 30], [25, 3, 30, 4]])
    shares = torch.ones(4, 1, 28, 28)
    shares[1, :, :, 14:] = 0
    pasted = decoded_masks(pasted_masks(shares, boxes, 10, 20), 10, 20)
    expected = np.zeros_like(pasted)
    expected[0, 1:5, 2:6] = expected[1, :10, 10:15] = expected[2, 3:, 10:] = 1  # pixels whose centers are inside
    assert np.array_equal(pasted, expected)


def test_ids_with_gaps_come_back(small):
    root, facts = small
    part = read_coco(str(save(root, facts))).test
    assert part.category_ids == (3, 9)
    assert part.class_names == ("early", "late")
    truth = true_objects(part, part.images)
    assert [row["category_id"] for row in truth["annotations"]] == [3]
    assert [row["image_id"] for row in truth["annotations"]] == [7]


def changed(facts, **fields):
    return {**facts, "annotations": [*facts["annotations"], {**facts["annotations"][0], "id": 2, **fields}]}


WHOLE = {"size": [10, 20], "counts": [0, 200]}
ANNOTATIONS = {
    "no image of the file": {"image_id": 8},
    "they name no image": {"image_id": [7]},
    "no category of the file": {"category_id": 4},
    "no box of four numbers": {"bbox": [1, 2, 3]},
    "they have no box": {"bbox": [1, 2, 3, float("nan")]},
    "nothing of their boxes is inside": {"bbox": [30, 2, 5, 5]},
    "nothing of their boxes": {"bbox": [3, 2, 0, 5]},
    "they have no mask": {"segmentation": None},
    "no polygons with three corners": {"segmentation": [[1, 2, 3, 4]]},
    "their masks are no polygons": {"segmentation": []},
    "masks have another size": {"segmentation": {**WHOLE, "size": [20, 10]}},
    "runs of their masks do not fill": {"segmentation": {**WHOLE, "counts": [0, 201]}},
    "compressed masks cannot be read": {"segmentation": {**WHOLE, "counts": "zz"}},
    "their compressed masks": {"segmentation": {**WHOLE, "counts": 5}},
}


@pytest.mark.parametrize("reason", ANNOTATIONS)
def test_bad_annotations_are_left_out_and_counted(small, reason):
    root, facts = small
    part = read_part(save(root, changed(facts, **ANNOTATIONS[reason])), "val2017")
    assert len(part.images[0].objects.masks) == 1, "the good one is kept"
    (note,) = part.notes
    assert note.startswith("val2017: 1 annotations are left out as ")
    assert reason in note
    assert "annotation 2" in note


def test_boxes_that_reach_out_are_cut(small):
    root, facts = small
    part = read_part(save(root, changed(facts, bbox=[-4, 5, 50, 50], segmentation=WHOLE)), "val2017")
    assert part.images[0].objects.boxes[1].tolist() == [0, 5, 20, 10]
    assert part.notes == ("val2017: 1 boxes are cut as they reach out of their image: annotation 2",)


def test_bad_images_are_left_out_and_counted(small):
    root, facts = small
    good = facts["images"][0]
    rows = [good, good, {**good, "id": "8"}, {**good, "id": 9, "width": 0}]
    part = read_part(save(root, {**facts, "images": rows}), "val2017")
    assert len(part) == 1
    assert len(part.notes) == 3


FILES = {
    "got no list of annotations": {"annotations": None},
    "got no list of images": {"images": [3]},
    "must list images, got none": {"images": []},
    "must have different whole numbers as ids, got .3, 3.": {"categories": [{"id": 3}, {"id": 3}]},
    "must have different whole numbers as ids, got .None.": {"categories": [{}]},
}


@pytest.mark.parametrize("reason", FILES)
def test_bad_files_of_annotations_are_named(small, reason):
    root, facts = small
    with pytest.raises(ValueError, match=reason):
        read_part(save(root, {**facts, **FILES[reason]}), "val2017")


def test_what_is_missing_is_named(small):
    root, facts = small
    with pytest.raises(FileNotFoundError, match="needs a file instances_train2017"):
        read_coco(str(root))
    save(root, facts)
    (root / "annotations/instances_train2017.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="must be COCO's JSON"):
        read_coco(str(root))
    save(root, {**facts, "categories": facts["categories"][1:]}, ["train2017"])
    with pytest.raises(ValueError, match="got 1 and 2 categories"):
        read_coco(str(root))
    save(root, {**facts, "annotations": []}, ["train2017"])
    with pytest.raises(ValueError, match="needs an image with objects, got none of 1"):
        read_coco(str(root))
    (root / "val2017/a.png").unlink()
    (root / "val2017").rmdir()
    with pytest.raises(ValueError, match="needs a folder val2017"):
        read_part(root, "val2017")


def test_images_that_are_not_as_named(small):
    root, facts = small
    image = read_part(save(root, facts), "val2017").images[0]
    assert image.read().shape == (10, 20, 3)
    Image.new("RGB", (20, 12)).save(image.path)
    with pytest.raises(ValueError, match="got 20 x 12, not 20 x 10"):
        image.read()
    image.path.unlink()
    with pytest.raises(OSError, match="Images must be readable"):
        image.read()
