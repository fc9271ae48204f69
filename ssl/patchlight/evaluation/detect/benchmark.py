"""Object detection and instance segmentation: a detector is trained on a pretrained backbone, and scored as COCO does."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...data.reading import describe_error
from ..encoder import Encoder, set_drop_path
from ..features import Reading
from ..norms import average_statistics, share_norms
from ..progress import progress
from ..ranks import Ranks
from ..training import Batches, broadcast_weights, layer_groups, set_rate, training_loader, update
from .annotations import CocoData, CocoImage, CocoPart
from .masks import pasted_masks
from .model import Detector
from .pictures import DetectPicture, DrawnObjects
from .protocols import DetectProtocol
from .scores import average_precisions, true_objects
from .training_images import Target, TrainingImages, collate, fitted, resized_image

_PICTURES, _DRAWN_SCORE = 4, 0.3  # objects below this score are not drawn


@dataclass(frozen=True)
class DetectResult:
    """Scores, and pictures of a few images."""

    metrics: dict[str, float] = field(default_factory=dict)  # empty but on the first rank
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)
    pictures: tuple[DetectPicture, ...] = ()


def evaluate_detect(
    encoder: Encoder, data: CocoData, protocol: DetectProtocol, ranks: Ranks, reading: Reading
) -> DetectResult:
    """AP of boxes and masks on the test images after training. The encoder is changed."""
    torch.manual_seed(protocol.seed)
    model = Detector(encoder, protocol, len(data.train.class_names)).to(ranks.device).requires_grad_(True)
    share_norms(model, ranks)
    broadcast_weights(model, ranks)
    torch.manual_seed(protocol.seed + 1 + ranks.rank)
    train_detector(model, data, protocol, ranks, reading)
    average_statistics(model, ranks)
    return score_detector(model, data, protocol, ranks, reading)


def train_detector(
    model: Detector, data: CocoData, protocol: DetectProtocol, ranks: Ranks, reading: Reading
) -> list[float]:
    """Trains all of a detector; the loss of each step on this rank."""
    device = ranks.device
    set_drop_path(model.encoder.backbone, protocol.drop_path)
    batches = Batches(len(data.train), protocol.batch, protocol.epochs, ranks, protocol.seed)
    groups = layer_groups(model.encoder.backbone, model.others(), protocol.layer_decay, protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=protocol.rate)
    images = TrainingImages(data.train, protocol)
    loader = training_loader(images, batches, reading.workers, device, data.unreadable, collate)
    model.train()
    found: list[Tensor] = []
    for step, (pixels, targets) in enumerate(progress(loader, "detection", ranks)):
        set_rate(optimizer, staged_rate(step, batches.steps_per_epoch, protocol))
        pixels = [image.to(device, non_blocking=True) for image in pixels]
        targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()} for target in targets]
        loss = torch.stack(list(model.losses(pixels, targets, reading.precision).values())).sum()
        update(loss, model, optimizer, ranks)
        found.append(loss.detach())
    return torch.stack(found).tolist()


def staged_rate(step: int, steps_per_epoch: int, protocol: DetectProtocol) -> float:
    """The learning rate of a step: a tenth after each milestone, and a straight rise from a thousandth at the start."""
    rate = protocol.rate * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in protocol.milestones)
    if step >= protocol.warmup:
        return rate
    return rate * (0.001 + 0.999 * step / protocol.warmup)


@torch.no_grad()
def score_detector(
    model: Detector, data: CocoData, protocol: DetectProtocol, ranks: Ranks, reading: Reading
) -> DetectResult:
    """Scores on all test images that can be read; each rank tests its share."""
    model.eval()
    rows: list[dict] = []
    numbers: list[int] = []
    pictures: list[DetectPicture] = []
    for number in progress(ranks.share(len(data.test)), "test images", ranks):
        image = data.test.images[int(number)]
        try:
            pixels = image.read()
        except Exception as error:  # a damaged file, or one of another size
            data.unreadable.add(data.test.name(int(number)), describe_error(error))
            continue
        found = found_in(model, pixels, protocol, ranks, reading)
        numbers.append(int(number))
        rows += _result_rows(data.test, image, found)
        if len(pictures) < _PICTURES:
            pictures.append(_picture(data.test, image, pixels, found))
    parts = ranks.gather((numbers, rows))
    if ranks.rank:
        return DetectResult()
    tested = [data.test.images[number] for number in sorted(n for part, _ in parts for n in part)]
    found_rows = [row for _, part in parts for row in part]
    metrics, by_class = average_precisions(true_objects(data.test, tested), found_rows)
    return DetectResult(metrics, by_class, tuple(pictures))


@dataclass(frozen=True)
class FoundObjects:
    """What was found in an image, in its own pixels, the best first."""

    boxes: np.ndarray  # [n, 4] left, top, right, bottom
    classes: np.ndarray  # [n] int64, from 0
    scores: np.ndarray  # [n]
    masks: list[dict]  # compressed runs


def found_in(
    model: Detector, pixels: np.ndarray, protocol: DetectProtocol, ranks: Ranks, reading: Reading
) -> FoundObjects:
    """The objects of an image [H, W, 3] uint8 of any size."""
    height, width = pixels.shape[:2]
    size = fitted((height, width), protocol.test_short_side, protocol.long_side)
    image = resized_image(torch.from_numpy(pixels).permute(2, 0, 1), size).to(ranks.device)
    found: Target = model.found([image], reading.precision)[0]
    boxes = found["boxes"] * torch.tensor([width / size[1], height / size[0]], device=ranks.device).repeat(2)
    masks = pasted_masks(found["masks"], boxes, height, width)
    numbers = [found[name].cpu().double().numpy() for name in ("labels", "scores")]
    return FoundObjects(boxes.cpu().double().numpy(), numbers[0].astype(np.int64) - 1, numbers[1], masks)


def _result_rows(part: CocoPart, image: CocoImage, found: FoundObjects) -> list[dict]:
    """What was found as COCO's results format has it."""
    columns = found.boxes.tolist(), found.classes.tolist(), found.scores.tolist(), found.masks
    return [
        {"image_id": image.id, "category_id": part.category_ids[number], "score": score, "segmentation": mask,
         "bbox": [left, top, right - left, bottom - top]}
        for (left, top, right, bottom), number, score, mask in zip(*columns, strict=True)
    ]  # fmt: skip


def _picture(part: CocoPart, image: CocoImage, pixels: np.ndarray, found: FoundObjects) -> DetectPicture:
    count = int((found.scores >= _DRAWN_SCORE).sum())  # they are in order
    captions = [f"{part.class_names[c]} {100 * s:.0f}" for c, s in zip(found.classes, found.scores, strict=True)]
    true = [part.class_names[c] for c in image.objects.classes]
    return DetectPicture(
        pixels,
        DrawnObjects(found.boxes[:count], found.masks[:count], captions[:count]),
        DrawnObjects(image.objects.boxes, image.masks(), true),
    )
