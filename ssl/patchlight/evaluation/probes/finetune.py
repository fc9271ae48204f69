"""Fine-tuning of the whole network on labels, all of them or 1 % and 10 %, with layer-wise learning rates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ..encoder import Encoder, autocast, set_drop_path
from ..encoder_folder import FINETUNED, as_file, write_encoder
from ..features import Reading
from ..norms import average_statistics
from ..progress import progress
from ..ranks import Ranks
from ..training import Batches, broadcast_weights, cosine_rate, layer_groups, set_rate, training_loader, update
from .classification import TrainingImages, count_test_images
from .finetune_protocols import FinetuneProtocol
from .labeled import LabeledData, LabeledImages

CLASSIFIER = "classifier.safetensors"  # weight and bias of the linear layer


class Classifier(nn.Module):
    """An encoder and a linear layer on its summary."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.encoder(pixels).summary)

    def others(self) -> nn.ModuleList:
        """The modules outside the backbone."""
        return nn.ModuleList([self.encoder.summary, self.head])


class Augment:
    """timm's training transform, from an array to normalized pixels."""

    def __init__(self, protocol: FinetuneProtocol, size: int, encoder: Encoder) -> None:
        self.change = timm.data.create_transform(
            size,
            is_training=True,
            auto_augment=protocol.randaugment or None,
            color_jitter=None,  # type: ignore[arg-type]  # timm turns it off by None, which its annotation leaves out
            re_prob=protocol.erase,
            re_mode="pixel",
            interpolation="bicubic",
            mean=encoder.input_format.mean,
            std=encoder.input_format.std,
        )
        for step in self.change.transforms:
            for op in getattr(step, "ops", ()):
                if op.name == "PosterizeIncreasing":
                    op.aug_fn = _posterize

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.change(Image.fromarray(image))


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """At least one bit is kept: timm passes 0 bits at the highest magnitude, a black image, which Pillow 13 refuses."""
    return ImageOps.posterize(image, max(1, bits))


class MixingLoss:
    """The loss of a batch: images are mixed and labels smoothed as in the protocol."""

    def __init__(self, protocol: FinetuneProtocol, classes: int) -> None:
        self.classes, self.mix = classes, None
        self.loss = LabelSmoothingCrossEntropy(protocol.smoothing) if protocol.smoothing else F.cross_entropy
        if protocol.mixup or protocol.cutmix:
            self.mix = timm.data.Mixup(
                protocol.mixup, protocol.cutmix, label_smoothing=protocol.smoothing, num_classes=classes
            )
            self.loss = SoftTargetCrossEntropy()

    def change(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and labels, both mixed if the protocol mixes images."""
        if self.mix is None:
            return pixels, labels
        if len(pixels) % 2:  # the last image of an odd batch has no partner
            return pixels, F.one_hot(labels, self.classes).float()
        return self.mix(pixels, labels)


class RepeatedBatches(Batches):
    """Batches in which each image is several times, changed anew each time: DeiT's repeated augmentation.

    An epoch has as many steps as without, so it has only some of the images. Copies go to different ranks.
    """

    def __init__(self, count: int, batch: int, epochs: int, ranks: Ranks, seed: int, repeats: int) -> None:
        super().__init__(count, batch, epochs, ranks, seed)
        self.repeats = repeats

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in range(self.epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count).repeat(self.repeats)
            for step in range(self.steps_per_epoch):
                batch = order[step * self.batch : (step + 1) * self.batch]
                whole = self.batch // self.ranks.world * self.ranks.world
                yield batch[:whole][self.ranks.rank :: self.ranks.world].tolist()


def train_classifier(
    encoder: Encoder,
    train: LabeledImages,
    data: LabeledData,
    protocol: FinetuneProtocol,
    ranks: Ranks,
    reading: Reading,
) -> Classifier:
    """The encoder, which is changed, with a new linear layer, after training on `train`; the same on all ranks."""
    size, device = protocol.size or encoder.input_format.image_size, ranks.device
    torch.manual_seed(protocol.seed)
    model = Classifier(encoder, data.class_count).to(device).requires_grad_(True)
    broadcast_weights(model, ranks)
    _seed(protocol.seed + 1 + ranks.rank)
    set_drop_path(encoder.backbone, protocol.drop_path)
    batches = RepeatedBatches(len(train), protocol.batch, protocol.epochs, ranks, protocol.seed, protocol.repeats)
    groups = layer_groups(encoder.backbone, model.others(), protocol.layer_decay, protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=protocol.rate)
    mixing = MixingLoss(protocol, data.class_count)
    images = TrainingImages(train, Augment(protocol, size, encoder))
    loader = training_loader(images, batches, reading.workers, device, data.unreadable)
    warmup = protocol.warmup_epochs * batches.steps_per_epoch
    model.train()
    for step, (pixels, labels) in enumerate(progress(loader, "fine-tuning", ranks)):
        set_rate(optimizer, cosine_rate(step, len(batches), protocol.rate, protocol.min_rate, warmup))
        pixels, labels = mixing.change(pixels.to(device, non_blocking=True), labels.to(device))
        with autocast(device, reading.precision):
            logits = model(pixels)
        update(mixing.loss(logits.float(), labels), model, optimizer, ranks, protocol.clip)
    average_statistics(model, ranks)
    return model.eval()


def _seed(seed: int) -> None:
    """Of all random numbers that timm's changes of images take."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 it is timm that draws from it
    random.seed(seed)


def evaluate_classifier(
    model: Classifier, data: LabeledData, protocol: FinetuneProtocol, ranks: Ranks, reading: Reading
) -> dict[str, float]:
    """top1 and top5 on the test images."""
    encoder, device = model.encoder, ranks.device
    size = protocol.size or encoder.input_format.image_size

    def classify(images: Tensor) -> list[Tensor]:
        with autocast(device, reading.precision):
            return [model(encoder.normalize(images.to(device))).float()]

    top1, top5, count = count_test_images(classify, 1, data, size, ranks, reading)[0].tolist()
    return {"top1": top1 / count, "top5": top5 / count}


def save_classifier(
    folder: Path,
    model: Classifier,
    data: LabeledData,
    protocol: FinetuneProtocol,
    metrics: dict[str, float],
    facts: dict[str, Any] | None,
) -> None:
    """The encoder as a folder that `open_checkpoint` opens, and its classifier. facts: of the run that pretrained it."""
    kept = {name: facts[name] for name in ("clock", "run") if name in facts} if facts else {}
    made = {"data": data.name, "classes": data.class_count, "top1": metrics["top1"], "protocol": asdict(protocol)}
    made |= {"checkpoint": model.encoder.name, "names": list(data.train.classes)}
    classifier = {CLASSIFIER: as_file(model.head.state_dict())}
    write_encoder(folder, model.encoder, kept | {FINETUNED: made}, classifier)
