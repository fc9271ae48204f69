"""Semantic segmentation with patch features: a head is trained on a frozen backbone or together with it, then scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ...checks import check
from ...data.reading import describe_error
from ..encoder import Encoder, autocast, set_drop_path
from ..features import Reading
from ..norms import average_statistics, share_norms
from ..progress import progress
from ..ranks import Ranks
from ..sheets import overlay, tile
from ..training import (
    Batches,
    broadcast_weights,
    cosine_rate,
    layer_groups,
    poly_rate,
    set_rate,
    training_loader,
    update,
)
from .crops import TrainingScenes
from .heads import UperNetHead
from .model import Segmenter, segmentation_loss
from .predictions import Predictions
from .protocols import SegmentProtocol
from .scenes import IGNORE, Scenes
from .scores import confusion_of, scores_of
from .windows import predict

_PICTURES = 4


@dataclass(frozen=True)
class ScenePicture:
    """One test scene for a sheet."""

    image: np.ndarray  # [H, W, 3] uint8
    predicted: np.ndarray  # [H, W] classes
    truth: np.ndarray  # [H, W] classes


@dataclass(frozen=True)
class SegmentResult:
    """Scores, and pictures of a few scenes."""

    metrics: dict[str, float]
    absent: tuple[int, ...]  # classes that are in no test scene; they are not scored unless they are predicted
    pictures: tuple[ScenePicture, ...]


def evaluate_segment(
    encoder: Encoder,
    data: Scenes,
    protocol: SegmentProtocol,
    ranks: Ranks,
    reading: Reading,
    predictions: Predictions | None = None,
) -> SegmentResult:
    """mIoU, aAcc and mAcc on the test scenes after training. The encoder is changed unless it is frozen.

    predictions: writes predicted classes as files, of the test scenes or of other images.
    """
    data.check_first()
    torch.manual_seed(protocol.seed)
    model = Segmenter(encoder, protocol.build_head(encoder, data.classes), protocol.features, protocol.blocks).to(
        ranks.device
    )
    share_norms(model, ranks)
    broadcast_weights(model, ranks)
    torch.manual_seed(protocol.seed + 1 + ranks.rank)
    _train(model, data, protocol, ranks, reading)
    average_statistics(model, ranks)
    result = _test(model, data, protocol, ranks, reading, predictions)
    if predictions is not None and predictions.images is not None:
        _write_others(model, data, protocol, ranks, reading, predictions)
    return result


def _train(model: Segmenter, data: Scenes, protocol: SegmentProtocol, ranks: Ranks, reading: Reading) -> None:
    encoder, device = model.encoder, ranks.device
    encoder.requires_grad_(not protocol.frozen)
    set_drop_path(encoder.backbone, protocol.drop_path)
    rule = "UPerNet needs two images or more per batch, as it normalizes one cell of each"
    least = min(protocol.batch, len(data.train))
    check(least > 1 or not isinstance(model.head, UperNetHead), rule, least, "use more images or a larger batch")
    per_epoch = max(1, len(data.train) // least)
    steps, warmup = protocol.total_steps(per_epoch), protocol.warmup_steps(per_epoch)
    batches = Batches(len(data.train), protocol.batch, -(-steps // per_epoch), ranks, protocol.seed)
    optimizer = _build_optimizer(model, protocol)
    loader = training_loader(TrainingScenes(data.train, protocol), batches, reading.workers, device, data.unreadable)
    model.train()
    encoder.train(not protocol.frozen)
    for step, (images, classes) in zip(progress(range(steps), "segmentation", ranks), loader, strict=False):
        set_rate(optimizer, _rate(protocol, step, steps, warmup))
        with autocast(device, reading.precision):
            maps = model(encoder.normalize(images.to(device, non_blocking=True)), protocol.frozen)
        update(segmentation_loss(maps, classes.to(device), ranks), model, optimizer, ranks)


def _build_optimizer(model: Segmenter, protocol: SegmentProtocol) -> torch.optim.Optimizer:
    groups = layer_groups(model.encoder.backbone, model.others(), protocol.layer_decay, protocol.weight_decay)
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups)


def _rate(protocol: SegmentProtocol, step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step."""
    if protocol.schedule == "poly":
        return poly_rate(step, steps, protocol.rate, protocol.min_rate, warmup, protocol.power)
    return cosine_rate(step, steps, protocol.rate, protocol.min_rate, warmup)


def _test(
    model: Segmenter,
    data: Scenes,
    protocol: SegmentProtocol,
    ranks: Ranks,
    reading: Reading,
    predictions: Predictions | None,
) -> SegmentResult:
    model.eval()
    confusion = torch.zeros(data.classes, data.classes, dtype=torch.int64)
    pictures: list[ScenePicture] = []
    for number in progress(ranks.share(len(data.test)), "test scenes", ranks):
        try:
            scene = data.test.read(int(number))
        except (OSError, ValueError) as error:  # a wrong mask too: days of training must not be lost for one file
            data.unreadable.add(data.test.name(int(number)), describe_error(error))
            continue
        predicted = predict(model, scene.image, protocol, ranks.device, reading.precision)
        confusion += confusion_of(torch.from_numpy(scene.classes), torch.from_numpy(predicted), data.classes)
        if predictions is not None and predictions.images is None:
            predictions.save(data.test.key(int(number)), predicted)
        if len(pictures) < _PICTURES:
            pictures.append(ScenePicture(scene.image, predicted, scene.classes))
    confusion = ranks.sum(confusion.to(ranks.device)).cpu()
    check(bool(confusion.any()), "Segmentation needs readable test scenes", "none", "look at the warnings above")
    absent = (confusion.sum(1) == 0).nonzero()[:, 0].tolist()
    return SegmentResult(scores_of(confusion, data.background), tuple(absent), tuple(pictures))


def _write_others(
    model: Segmenter,
    data: Scenes,
    protocol: SegmentProtocol,
    ranks: Ranks,
    reading: Reading,
    predictions: Predictions,
) -> None:
    """Predictions for images without masks. Those that cannot be read are named and have none."""
    images = predictions.images
    assert images is not None
    for number in progress(ranks.share(len(images)), "predictions", ranks):
        try:
            image = images.image(int(number))
        except OSError as error:
            data.unreadable.add(images.name(int(number)), describe_error(error))
            continue
        predictions.save(images.key(int(number)), predict(model, image, protocol, ranks.device, reading.precision))


def draw_segments(pictures: tuple[ScenePicture, ...]) -> Image.Image:
    """A row per scene: the image, with the predicted classes, with the true ones."""
    rows = []
    for picture in pictures:
        image, truth = picture.image, np.where(picture.truth == IGNORE, 0, picture.truth)
        size = (256, round(256 * image.shape[0] / image.shape[1]))
        row = [image, overlay(image, picture.predicted % 256), overlay(image, truth % 256)]
        rows.append([Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in row])
    return tile(rows)
