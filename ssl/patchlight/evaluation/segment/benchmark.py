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
from .model import Segmenter, segmentation_loss
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
    encoder: Encoder, data: Scenes, protocol: SegmentProtocol, ranks: Ranks, reading: Reading
) -> SegmentResult:
    """mIoU, aAcc and mAcc on the test scenes after training. The encoder is changed unless it is frozen."""
    torch.manual_seed(protocol.seed)
    model = Segmenter(encoder, protocol.build_head(encoder.width, data.classes)).to(ranks.device)
    broadcast_weights(model, ranks)
    torch.manual_seed(protocol.seed + 1 + ranks.rank)
    _train(model, data, protocol, ranks, reading)
    return _test(model, data, protocol, ranks, reading)


def _train(model: Segmenter, data: Scenes, protocol: SegmentProtocol, ranks: Ranks, reading: Reading) -> None:
    encoder, device = model.encoder, ranks.device
    encoder.requires_grad_(not protocol.frozen)
    set_drop_path(encoder.backbone, protocol.drop_path)
    epochs = -(-protocol.steps // max(1, len(data.train) // min(protocol.batch, len(data.train))))
    batches = Batches(len(data.train), protocol.batch, epochs, ranks, protocol.seed)
    groups = layer_groups(encoder.backbone, model.others(), protocol.layer_decay, protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    rate_of = {"poly": poly_rate, "cosine": cosine_rate}[protocol.schedule]
    scenes = TrainingScenes(data.train, protocol)
    loader = training_loader(scenes, batches, reading.workers, device, data.unreadable)
    model.train()
    encoder.train(not protocol.frozen)
    steps = progress(range(protocol.steps), "segmentation", ranks)
    for step, (images, classes) in zip(steps, loader, strict=False):
        set_rate(optimizer, rate_of(step, protocol.steps, protocol.rate, protocol.min_rate, protocol.warmup))
        with autocast(device, reading.precision):
            maps = model(encoder.normalize(images.to(device, non_blocking=True)), protocol.frozen)
        update(segmentation_loss(maps, classes.to(device)), model, optimizer, ranks)


def _test(model: Segmenter, data: Scenes, protocol: SegmentProtocol, ranks: Ranks, reading: Reading) -> SegmentResult:
    model.eval()
    confusion = torch.zeros(data.classes, data.classes, dtype=torch.int64)
    pictures: list[ScenePicture] = []
    for number in progress(ranks.share(len(data.test)), "test scenes", ranks):
        try:
            scene = data.test.read(int(number))
        except OSError as error:
            data.unreadable.add(data.test.name(int(number)), describe_error(error))
            continue
        predicted = predict(model, scene.image, protocol, ranks.device, reading.precision)
        confusion += confusion_of(torch.from_numpy(scene.classes), torch.from_numpy(predicted), data.classes)
        if len(pictures) < _PICTURES:
            pictures.append(ScenePicture(scene.image, predicted, scene.classes))
    confusion = ranks.sum(confusion.to(ranks.device)).cpu()
    check(bool(confusion.any()), "Segmentation needs readable test scenes", "none", "look at the warnings above")
    absent = (confusion.sum(1) == 0).nonzero()[:, 0].tolist()
    return SegmentResult(scores_of(confusion), tuple(absent), tuple(pictures))


def draw_segments(pictures: tuple[ScenePicture, ...]) -> Image.Image:
    """A row per scene: the image, with the predicted classes, with the true ones."""
    rows = []
    for picture in pictures:
        image, truth = picture.image, np.where(picture.truth == IGNORE, 0, picture.truth)
        size = (256, round(256 * image.shape[0] / image.shape[1]))
        row = [image, overlay(image, picture.predicted % 256), overlay(image, truth % 256)]
        rows.append([Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in row])
    return tile(rows)
