"""Linear probe, DINO's protocol: a linear classifier on frozen features, one per learning rate, all in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from ..encoder import Encoded, Encoder
from ..features import Reading
from ..images import CenterCrops, shown
from ..progress import progress
from ..ranks import Ranks
from ..training import Batches, average_gradients, cosine_rate, share_start, training_loader
from .classification import TrainingImages, count_right
from .labeled import Labelled


@dataclass(frozen=True)
class LinearProtocol:
    """DINO's linear classification; ViT-B has layers=1 and average_pool=True."""

    layers: int = 4
    """The last blocks whose class tokens are read, side by side."""
    average_pool: bool = False
    """Whether the mean of the last block's patches is read too."""
    epochs: int = 100
    """Passes over the training images, each with a random crop and flip."""
    batch: int = 1024
    """Images per step over all ranks."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates per 256 images, a classifier each; 1e-3 is the released one."""
    momentum: float = 0.9
    """Of SGD, without weight decay; the rate falls to 0 by a cosine."""
    size: int | None = None
    """Side of the images; null: what the position table is made for."""
    seed: int = 0
    """Of the order of images, crops and starts."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.epochs < 1 or self.batch < 1 or not self.rates:
            raise ValueError(
                "LinearProtocol: layers, epochs, batch and the number of rates must be positive, got"
                f" {self.layers}, {self.epochs}, {self.batch} and {len(self.rates)}."
            )


def probe_features(seen: Encoded, average_pool: bool) -> Tensor:
    """[B, layers * D (+ D)] from the levels of an encoder, the last block last; the last summary is the method's own."""
    parts = [*(level.summary for level in seen.levels[:-1]), seen.summary]
    return torch.cat([*parts, seen.patches.mean(1)] if average_pool else parts, dim=1)


class RandomCrop:
    """A random part of an image, at times mirrored: [3, size, size] uint8."""

    def __init__(self, size: int, smallest: float = 0.08) -> None:
        self.change = v2.Compose(
            [
                v2.RandomResizedCrop(size, (smallest, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.change(torch.from_numpy(image).permute(2, 0, 1))


def evaluate_linear(
    encoder: Encoder, data: Labelled, protocol: LinearProtocol, ranks: Ranks, reading: Reading
) -> dict[str, float]:
    """top1 and top5 of the best classifier, and top1 of each by its rate. The best is chosen on the test images, as usual."""
    size, device = protocol.size or encoder.eyes.image_size, ranks.device
    if protocol.layers > encoder.depth:
        raise ValueError(f"LinearProtocol.layers must not exceed the depth, got {protocol.layers} of {encoder.depth}.")
    layers = tuple(range(-protocol.layers, 0))
    torch.manual_seed(protocol.seed)
    width = encoder.width * (protocol.layers + protocol.average_pool)
    heads = nn.ModuleList(nn.Linear(width, data.classes) for _ in protocol.rates).to(device)
    for head in heads:
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    share_start(heads, ranks)
    torch.manual_seed(protocol.seed + 1 + ranks.rank)
    encoder.eval().requires_grad_(False)
    batches = Batches(len(data.train), protocol.batch, protocol.epochs, ranks, protocol.seed)
    groups = [{"params": head.parameters(), "share": rate} for head, rate in zip(heads, protocol.rates, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=protocol.momentum)
    loader = training_loader(TrainingImages(data.train, RandomCrop(size)), batches, reading.workers, device)

    def look(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
            seen = encoder(encoder.normalize(images.to(device, non_blocking=True)), layers)
        return probe_features(seen, protocol.average_pool).float()

    for step, (images, labels) in enumerate(progress(loader, "linear probe") if ranks.rank == 0 else loader):
        rate = cosine_rate(step, len(batches), batches.batch / 256)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        features, labels = look(images), labels.to(device)
        loss = sum(F.cross_entropy(head(features), labels) for head in heads)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(heads, ranks)
        optimizer.step()

    right = torch.zeros(len(heads), 3, dtype=torch.float64)
    crops = CenterCrops(data.test, ranks.share(len(data.test)), size, shown(size, data.whole))
    labels_of = torch.from_numpy(data.test.labels)
    for images, numbers in DataLoader(crops, reading.batch, num_workers=reading.workers):
        features, labels = look(images), labels_of[numbers].to(device)
        with torch.no_grad():
            right += torch.stack([count_right(head(features), labels) for head in heads])
    right = ranks.sum(right)
    top1, top5 = right[:, 0] / right[:, 2], right[:, 1] / right[:, 2]
    best = int(top1.argmax())
    each = {f"top1@{rate:g}": share for rate, share in zip(protocol.rates, top1.tolist(), strict=True)}
    return {"top1": top1[best].item(), "top5": top5[best].item()} | each
