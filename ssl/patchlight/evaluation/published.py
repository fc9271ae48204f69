"""Numbers that papers give for these protocols, to be printed beside the measured ones. Percent throughout."""

from __future__ import annotations

from dataclasses import dataclass

SELFPATCH, PQCL, SERE = "SelfPatch paper", "PQCL paper", "SERE paper"


@dataclass(frozen=True)
class Published:
    """One row of a paper's table."""

    task: str
    data: str
    method: str
    backbone: str
    epochs: int | None  # of pretraining; None where the source does not say
    metrics: dict[str, float]
    source: str


def _rows(task: str, data: str, names: tuple[str, ...], source: str, *rows: tuple) -> tuple[Published, ...]:
    """Rows (method, backbone, epochs, values...) of one table."""
    return tuple(Published(task, data, *row[:3], dict(zip(names, row[3:], strict=True)), source) for row in rows)


_S, _B = "ViT-S/16", "ViT-B/16"
PUBLISHED: tuple[Published, ...] = (
    *_rows(
        "knn",
        "imagenet",
        ("k20",),
        "released README",
        ("DINO", _S, 100, 69.3),
        ("DINO", _S, 800, 74.5),
        ("iBOT", _S, 800, 75.2),
    ),
    *_rows(
        "linear",
        "imagenet",
        ("top1",),
        "released README",
        ("DINO", _S, 100, 74.0),
        ("iBOT", _S, 800, 77.9),
    ),
    *_rows(
        "linear",
        "imagenet",
        ("top1",),
        f"{PQCL}, Table 1, no local crops",
        ("DINO", _S, 100, 67.8),
        ("DINO", _S, 300, 72.5),
        ("iBOT", _S, 100, 68.8),
        ("PQCL-iBOT", _S, 100, 69.7),
        ("PQCL-iBOT", _S, 800, 74.4),
        ("PQCL-iBOT", _B, 400, 76.9),
    ),
    *_rows(
        "davis",
        "davis2017",
        ("J&F", "J_mean", "F_mean"),
        f"{SELFPATCH}, Table 3",
        ("MoCo v3", _S, 300, 53.5, 51.2, 55.9),
        ("MoBY", _S, 300, 54.7, 52.0, 57.3),
        ("DINO", _S, 300, 60.7, 59.1, 62.4),
        ("DINO + SelfPatch", _S, 200, 62.7, 60.7, 64.7),
    ),
    *_rows(
        "davis",
        "davis2017",
        ("J&F", "J_mean", "F_mean"),
        f"{PQCL}, Table 5",
        ("PQCL-DINO", _S, None, 63.4, 61.4, 65.3),
        ("iBOT", _S, None, 61.3, 60.1, 64.0),
        ("PQCL-iBOT", _S, None, 63.8, 61.7, 65.5),
    ),
    *_rows(
        "segment-fpn",
        "ade20k",
        ("mIoU", "aAcc", "mAcc"),
        f"{SELFPATCH}, Table 2",
        ("MoCo v3", _S, 300, 35.3, 78.9, 45.9),
        ("MoBY", _S, 300, 39.5, 79.9, 50.5),
        ("DINO", _S, 300, 38.3, 79.0, 49.4),
        ("DINO + SelfPatch", _S, 200, 41.2, 80.7, 52.1),
    ),
    *_rows(
        "segment-upernet",
        "ade20k",
        ("mIoU", "aAcc", "mAcc"),
        f"{PQCL}, Table 3",
        ("DINO", _S, 300, 42.3, 80.4, 52.7),
        ("SelfPatch", _S, 200, 43.2, 81.5, 53.9),
        ("DINO", _S, 800, 44.4, 81.7, 55.5),
        ("iBOT", _S, 200, 44.1, 81.4, 55.3),
        ("PQCL-iBOT", _S, 200, 45.2, 81.9, 56.0),
    ),
    *_rows(
        "segment-upernet",
        "ade20k",
        ("mIoU", "mAcc"),
        f"{SERE}, Tables 2 and 3",
        ("DINO", _S, 100, 42.6, 53.4),
        ("DINO + SERE", _S, 100, 43.8, 54.6),
        ("iBOT", _S, 800, 45.4, 56.2),
        ("iBOT + SERE", _S, 100, 45.8, 56.8),
    ),
    *_rows(
        "segment-upernet",
        "voc2012",
        ("mIoU", "mAcc"),
        f"{SERE}, Table 2",
        ("DINO", _S, 100, 77.1, 87.5),
        ("DINO + SERE", _S, 100, 79.7, 88.8),
    ),
    *_rows(
        "segment-conv",
        "imagenet-s",
        ("mIoU",),
        f"{SERE}, Table 1, val, from pretraining",
        ("DINO", _S, 100, 35.1),
        ("DINO + SERE", _S, 100, 36.9),
        ("iBOT", _S, 100, 38.1),
        ("iBOT + SERE", _S, 100, 41.0),
        ("iBOT + SERE", _B, 200, 48.6),
    ),
    *_rows(
        "finetune",
        "imagenet",
        ("top1", "top5"),
        f"{SERE}, Table 1",
        ("DINO", _S, 100, 79.7, 95.1),
        ("DINO + SERE", _S, 100, 80.9, 95.5),
        ("iBOT", _S, 100, 80.9, 95.4),
        ("iBOT + SERE", _S, 100, 81.5, 95.8),
    ),
    *_rows(
        "finetune-1%",
        "imagenet",
        ("top1", "top5"),
        f"{SERE}, Table 4",
        ("DINO", _S, 100, 52.1, 77.8),
        ("DINO + SERE", _S, 100, 55.9, 81.0),
    ),
    *_rows(
        "finetune-10%",
        "imagenet",
        ("top1", "top5"),
        f"{SERE}, Table 4",
        ("DINO", _S, 100, 70.0, 89.8),
        ("DINO + SERE", _S, 100, 71.5, 90.6),
    ),
)


def published(task: str, data: str) -> list[Published]:
    """What is known of a task on a data set."""
    return [row for row in PUBLISHED if (row.task, row.data) == (task, data)]
