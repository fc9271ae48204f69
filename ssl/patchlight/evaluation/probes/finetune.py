"""Fine-tuning of the whole network on labels, all of them or 1 % and 10 %, with layer-wise learning rates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ...checks import check, check_positive
from ..encoder import Encoder, autocast, set_drop_path
from ..features import Reading
from ..progress import progress
from ..ranks import Ranks
from ..training import Batches, broadcast_weights, cosine_rate, layer_groups, set_rate, training_loader, update
from .classification import TrainingImages, count_test_images
from .labeled import LabeledData, LabeledImages


@dataclass(frozen=True)
class FinetuneProtocol:
    """The SERE paper's fine-tuning (Section 4.2). Augmentation and drop path are not stated there; they are BEiT's and iBOT's."""

    epochs: int = 100
    """Passes over the training images."""
    batch: int = 512
    """Images per step over all ranks."""
    rate: float = 1e-3
    """Learning rate of the head for a batch of this size; it is not scaled."""
    min_rate: float = 1e-6
    """The rate at the end of its cosine."""
    warmup_epochs: int = 5
    """Epochs over which the rate rises."""
    layer_decay: float = 0.65
    """Each block's rate is this share of that of the one above it."""
    weight_decay: float = 0.05
    """Of AdamW; vectors, biases and tokens have none."""
    drop_path: float = 0.1
    """The last block's rate of dropping a residual branch."""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of the augmentation; empty: crops and flips only."""
    erase: float = 0.25
    """Share of images with a random box erased."""
    mixup: float = 0.8
    """Strength of mixing images; 0 turns it off."""
    cutmix: float = 1.0
    """Strength of pasting boxes; 0 turns it off."""
    smoothing: float = 0.1
    """Of labels."""
    clip: float = 0.0
    """Largest norm over all gradients; 0: none."""
    size: int | None = None
    """Side of the images; None: the size that the position table was made for."""
    seed: int = 0
    """Of order, augmentation and the head's start."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("epochs", "batch", "rate", "layer_decay"):
            check_positive(f"{name}.{field}", getattr(self, field), "the published value is the default")
        check(
            0 <= self.warmup_epochs <= self.epochs,
            f"{name}.warmup_epochs must lie in [0, epochs]",
            f"{self.warmup_epochs} of {self.epochs}",
            "change one of them",
        )


@dataclass(frozen=True)
class SemiProtocol(FinetuneProtocol):
    """The SERE paper's semi-supervised setting: 1000 epochs, batches of 1024, 1e-5. What it does not state is turned off."""

    epochs: int = 1000
    """Passes over the labeled images."""
    batch: int = 1024
    """Images per step over all ranks."""
    rate: float = 1e-5
    """Learning rate; it is not scaled."""
    layer_decay: float = 1.0
    """All blocks have the same rate."""
    drop_path: float = 0.0
    """Turned off."""
    randaugment: str = ""
    """Crops and flips only."""
    erase: float = 0.0
    """Turned off."""
    mixup: float = 0.0
    """Turned off."""
    cutmix: float = 0.0
    """Turned off."""
    smoothing: float = 0.0
    """Turned off."""


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
                protocol.mixup, protocol.cutmix, label_smoothing=protocol.smoothing, num_classes=classes, mode="elem"
            )
            self.loss = SoftTargetCrossEntropy()

    def change(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and labels, both mixed if the protocol mixes images."""
        if self.mix is None:
            return pixels, labels
        if len(pixels) % 2:  # the last image of an odd batch has no partner
            return pixels, F.one_hot(labels, self.classes).float()
        return self.mix(pixels, labels)


def evaluate_finetune(
    encoder: Encoder,
    train: LabeledImages,
    data: LabeledData,
    protocol: FinetuneProtocol,
    ranks: Ranks,
    reading: Reading,
) -> dict[str, float]:
    """top1 and top5 on the test images after training on `train`. The encoder is changed."""
    size, device = protocol.size or encoder.input_format.image_size, ranks.device
    torch.manual_seed(protocol.seed)
    model = Classifier(encoder, data.class_count).to(device).requires_grad_(True)
    broadcast_weights(model, ranks)
    torch.manual_seed(protocol.seed + 1 + ranks.rank)
    set_drop_path(encoder.backbone, protocol.drop_path)
    batches = Batches(len(train), protocol.batch, protocol.epochs, ranks, protocol.seed)
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
    model.eval()

    def classify(images: Tensor) -> list[Tensor]:
        with autocast(device, reading.precision):
            return [model(encoder.normalize(images.to(device))).float()]

    top1, top5, count = count_test_images(classify, 1, data, size, ranks, reading)[0].tolist()
    return {"top1": top1 / count, "top5": top5 / count}
