"""COCO's average precision of boxes and of masks, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from ...checks import check
from .annotations import CocoImage, CocoPart

KINDS = {"box": "bbox", "mask": "segm"}


def true_objects(part: CocoPart, images: Sequence[CocoImage]) -> dict:
    """The objects of some images as COCO's JSON has them, with boxes inside their images and masks as compressed runs."""
    annotations: list[dict] = []
    for image in images:
        objects = image.objects
        columns = objects.boxes.tolist(), objects.classes.tolist(), objects.crowd.tolist(), objects.areas.tolist()
        for (left, top, right, bottom), number, crowd, area, mask in zip(*columns, image.masks(), strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image.id, "category_id": part.category_ids[number],
                "bbox": [left, top, right - left, bottom - top], "area": area, "iscrowd": int(crowd),
                "segmentation": mask,
            })  # fmt: skip
    rows = [{"id": image.id, "height": image.height, "width": image.width} for image in images]
    names = zip(part.category_ids, part.class_names, strict=True)
    return {"images": rows, "annotations": annotations, "categories": [{"id": id, "name": n} for id, n in names]}


def average_precisions(truth: dict, found: list[dict]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """AP, AP50 and AP75 of boxes and masks as shares of 1, and the AP of each class. found: rows of COCO's results format."""
    wanted = any(not row["iscrowd"] for row in truth["annotations"])
    check(
        wanted, "Detection scores need a test image with an object", "none that could be read", "look at the warnings"
    )
    metrics, by_class = {}, {}
    true = COCO(truth)
    for name, kind in KINDS.items():
        run = COCOeval_faster(true, true.loadRes([dict(row) for row in found]), kind, print_function=lambda *_: None)
        run.evaluate()
        run.accumulate()
        precision = run.eval["precision"][..., 0, -1]  # [overlaps, recalls, classes], of all sizes, of all found
        per_class = np.where(precision > -1, precision, np.nan).mean((0, 1))  # NaN for a class that is in no image
        overlaps = [float(np.nanmean(np.where(part > -1, part, np.nan))) for part in (precision[0], precision[5])]
        metrics[f"{name} AP"], (metrics[f"{name} AP50"], metrics[f"{name} AP75"]) = (
            float(np.nanmean(per_class)),
            overlaps,
        )
        names = [c["name"] for c in truth["categories"]]
        by_class[f"{name} AP"] = {n: float(v) for n, v in zip(names, per_class, strict=True) if not np.isnan(v)}
    return metrics, by_class
