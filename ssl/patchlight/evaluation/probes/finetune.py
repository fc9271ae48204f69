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
from torch.utils.data import DataLoader

from ..encoder import Encoder, set_drop_path
from ..features import Reading
from ..images import CenterCrops, shown
from ..progress import progress
from ..ranks import Ranks
from ..training import (
    Batches,
    average_gradients,
    cosine_rate,
    layer_groups,
    set_rate,
    share_start,
    training_loader,
)
from .classification import TrainingImages, count_right
from .labeled import Labelled, Subset


@dataclass(frozen=True)
class FinetuneProtocol:
    """The SERE paper's fine-tuning (Section 4.2). Augmentation and drop path, which it does not state, are BEiT's, as iBOT's."""

    epochs: int = 100
    """Passes over the training images."""
    batch: int = 512
    """Images per step over all ranks."""
    rate: float = 1e-3
    """Learning rate of the head for a batch of this size; it is not scaled."""
    min_rate: float = 1e-6
    """Where its cosine ends."""
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
    """Side of the images; null: what the position table is made for."""
    seed: int = 0
    """Of order, augmentation and the head's start."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "rate", "layer_decay"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{type(self).__name__}.{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"{type(self).__name__}.warmup_epochs must lie in [0, epochs], got {self.warmup_epochs} of {self.epochs}."
            )


@dataclass(frozen=True)
class SemiProtocol(FinetuneProtocol):
    """The SERE paper's semi-supervised setting: 1000 epochs, batches of 1024, 1e-5. The rest, unstated, is kept plain."""

    epochs: int = 1000
    """Passes over the labelled images."""
    batch: int = 1024
    """Images per step over all ranks."""
    rate: float = 1e-5
    """Learning rate; it is not scaled."""
    layer_decay: float = 1.0
    """Every block learns equally fast."""
    drop_path: float = 0.0
    """None."""
    randaugment: str = ""
    """Crops and flips only."""
    erase: float = 0.0
    """None."""
    mixup: float = 0.0
    """Off."""
    cutmix: float = 0.0
    """Off."""
    smoothing: float = 0.0
    """None."""


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
        """What is not the backbone."""
        return nn.ModuleList([self.encoder.summary, self.head])


class Augment:
    """timm's training transform, from an array to normalized pixels."""

    def __init__(self, protocol: FinetuneProtocol, size: int, encoder: Encoder) -> None:
        self.change = timm.data.create_transform(
            size,
            is_training=True,
            auto_augment=protocol.randaugment or None,
            color_jitter=None,
            re_prob=protocol.erase,
            re_mode="pixel",
            interpolation="bicubic",
            mean=encoder.eyes.mean,
            std=encoder.eyes.std,
        )
        for step in self.change.transforms:
            for op in getattr(step, "ops", ()):
                if op.name == "PosterizeIncreasing":
                    op.aug_fn = _posterize

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.change(Image.fromarray(image))


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm asks for 0 bits at the highest magnitude, a black image, which Pillow 13 refuses: one bit is kept."""
    return ImageOps.posterize(image, max(1, bits))


def evaluate_finetune(
    encoder: Encoder, train: Subset, data: Labelled, protocol: FinetuneProtocol, ranks: Ranks, reading: Reading
) -> dict[str, float]:
    """top1 and top5 on the test images after training on `train`. The encoder is changed."""
    size, device = protocol.size or encoder.eyes.image_size, ranks.device
    torch.manual_seed(protocol.seed)
    model = Classifier(encoder, data.classes).to(device).requires_grad_(True)
    share_start(model, ranks)
    torch.manual_seed(protocol.seed + 1 + ranks.rank)
    set_drop_path(encoder.backbone, protocol.drop_path)
    batches = Batches(len(train), protocol.batch, protocol.epochs, ranks, protocol.seed)
    groups = layer_groups(encoder.backbone, model.others(), protocol.layer_decay, protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=protocol.rate)
    mix, loss_of = None, LabelSmoothingCrossEntropy(protocol.smoothing) if protocol.smoothing else F.cross_entropy
    if protocol.mixup or protocol.cutmix:
        mix = timm.data.Mixup(
            protocol.mixup, protocol.cutmix, label_smoothing=protocol.smoothing, num_classes=data.classes, mode="elem"
        )
        loss_of = SoftTargetCrossEntropy()
    loader = training_loader(TrainingImages(train, Augment(protocol, size, encoder)), batches, reading.workers, device)
    warmup = protocol.warmup_epochs * batches.steps_per_epoch
    model.train()
    for step, (pixels, labels) in enumerate(progress(loader, "fine-tuning") if ranks.rank == 0 else loader):
        set_rate(optimizer, cosine_rate(step, len(batches), protocol.rate, protocol.min_rate, warmup))
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device)
        if mix is not None and len(pixels) % 2 == 0:  # an odd batch has no partner for its last image
            pixels, labels = mix(pixels, labels)
        elif mix is not None:
            labels = F.one_hot(labels, data.classes).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
            logits = model(pixels)
        loss = loss_of(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, ranks)
        if protocol.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), protocol.clip)
        optimizer.step()
    return _test(model, data, size, ranks, reading)


@torch.no_grad()
def _test(model: Classifier, data: Labelled, size: int, ranks: Ranks, reading: Reading) -> dict[str, float]:
    model.eval()
    right, labels_of = torch.zeros(3, dtype=torch.float64), torch.from_numpy(data.test.labels)
    crops = CenterCrops(data.test, ranks.share(len(data.test)), size, shown(size, data.whole))
    for images, numbers in DataLoader(crops, reading.batch, num_workers=reading.workers):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
            logits = model(model.encoder.normalize(images.to(ranks.device)))
        right += count_right(logits.float(), labels_of[numbers].to(ranks.device))
    top1, top5, count = ranks.sum(right).tolist()
    return {"top1": top1 / count, "top5": top5 / count}
