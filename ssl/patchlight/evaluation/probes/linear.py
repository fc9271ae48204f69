"""Linear probe, DINO's protocol: linear classifiers on frozen features, one per learning rate, trained in one pass.

What is read depends on the backbone, as published: ViT-Ti and ViT-S the class tokens of the last four blocks; ViT-B and larger
the last one and the mean of the patches (DINO); Swin (MoBY) and ResNet (DINO) the mean of the last stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from ...checks import check
from ..encoder import Encoded, Encoder, autocast
from ..features import Reading
from ..progress import progress
from ..ranks import Ranks
from ..training import Batches, broadcast_weights, cosine_rate, set_rate, training_loader, update
from .classification import TrainingImages, count_test_images
from .labeled import LabeledData

WIDE = 768  # of ViT-B


@dataclass(frozen=True)
class LinearProtocol:
    """DINO's linear classification."""

    layers: int | None = None
    """The last blocks whose class tokens are read, side by side; None: as published for the backbone, 4 of ViT-Ti and ViT-S."""
    average_pool: bool | None = None
    """Whether the mean of the last block's patches is read too; None: as published for the backbone, only of ViT-B and larger."""
    epochs: int = 100
    """Passes over the training images, each with a random crop and flip."""
    batch: int = 1024
    """Images per step over all ranks."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates per 256 images, a classifier each; 1e-3 is the released one."""
    momentum: float = 0.9
    """Of SGD, without weight decay; the rate falls to 0 by a cosine."""
    size: int | None = None
    """Side of the images; None: the size that the position table was made for."""
    seed: int = 0
    """Of the order of images, crops and starts."""

    def __post_init__(self) -> None:
        layers = 1 if self.layers is None else self.layers
        check(
            min(layers, self.epochs, self.batch, len(self.rates)) > 0,
            "LinearProtocol: layers, epochs, batch and the number of rates must be positive",
            f"{self.layers}, {self.epochs}, {self.batch} and {len(self.rates)}",
            "change what is 0",
        )

    def on(self, encoder: Encoder) -> LinearProtocol:
        """With what is read of this encoder filled in: as published, and of a ViT of fewer blocks as many as there are."""
        published = published_linear(encoder)
        assert published.layers is not None
        layers = min(published.layers, encoder.depth) if self.layers is None else self.layers
        rule, got = "LinearProtocol.layers must not exceed the depth", f"{layers} of {encoder.depth}"
        check(layers <= encoder.depth, rule, got, "use fewer layers")
        average_pool = published.average_pool if self.average_pool is None else self.average_pool
        return replace(self, layers=layers, average_pool=average_pool)


def published_linear(encoder: Encoder) -> LinearProtocol:
    """The published protocol for the encoder's backbone."""
    if not encoder.backbone.returns_blocks:
        return LinearProtocol(layers=1, average_pool=False)
    wide = encoder.width >= WIDE
    return LinearProtocol(layers=1 if wide else 4, average_pool=wide)


def missing_layers(protocol: LinearProtocol, encoder: Encoder) -> tuple[str, ...]:
    """A note where the backbone has fewer blocks than the published protocol reads."""
    published = published_linear(encoder).layers
    if protocol.layers is not None or published is None or published <= encoder.depth:
        return ()
    return (f"{encoder.depth} blocks are read, which is all that there are, instead of the published {published}",)


def probe_features(encoded: Encoded, average_pool: bool) -> Tensor:
    """[B, layers * D (+ D)] from the levels of an encoder, the last block last. The last summary is the method's own."""
    parts = [*(level.summary for level in encoded.levels[:-1]), encoded.summary]
    return torch.cat([*parts, encoded.patches.mean(1)] if average_pool else parts, dim=1)


class RandomCrop:
    """A random part of an image, mirrored in half of the cases: [3, size, size] uint8."""

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
    encoder: Encoder, data: LabeledData, protocol: LinearProtocol, ranks: Ranks, reading: Reading
) -> dict[str, float]:
    """top1 and top5 of the best classifier, and top1 of each by its rate. The best is chosen on the test images, as usual."""
    size, device = protocol.size or encoder.input_format.image_size, ranks.device
    protocol = protocol.on(encoder)
    assert protocol.layers is not None
    layers, average_pool = tuple(range(-protocol.layers, 0)), bool(protocol.average_pool)
    torch.manual_seed(protocol.seed)
    width = encoder.width * (len(layers) + average_pool)
    heads = _build_heads(width, data.class_count, len(protocol.rates), device)
    broadcast_weights(heads, ranks)
    torch.manual_seed(protocol.seed + 1 + ranks.rank)
    encoder.eval().requires_grad_(False)

    def features_of(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, reading.precision):
            encoded = encoder(encoder.normalize(images.to(device, non_blocking=True)), layers)
        return probe_features(encoded, average_pool).float()

    def classify(images: Tensor) -> list[Tensor]:
        features = features_of(images)
        return [head(features) for head in heads]

    batches = Batches(len(data.train), protocol.batch, protocol.epochs, ranks, protocol.seed)
    groups = [{"params": head.parameters(), "lr_scale": rate} for head, rate in zip(heads, protocol.rates, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=protocol.momentum)
    loader = training_loader(
        TrainingImages(data.train, RandomCrop(size)), batches, reading.workers, device, data.unreadable
    )
    for step, (images, labels) in enumerate(progress(loader, "linear probe", ranks)):
        set_rate(optimizer, cosine_rate(step, len(batches), batches.batch / 256))
        labels = labels.to(device)
        losses = [F.cross_entropy(logits, labels) for logits in classify(images)]
        update(torch.stack(losses).sum(), heads, optimizer, ranks)
    counts = count_test_images(classify, len(heads), data, size, ranks, reading)
    top1, top5 = counts[:, 0] / counts[:, 2], counts[:, 1] / counts[:, 2]
    best = int(top1.argmax())
    by_rate = {f"top1@{rate:g}": accuracy for rate, accuracy in zip(protocol.rates, top1.tolist(), strict=True)}
    return {"top1": top1[best].item(), "top5": top5[best].item()} | by_rate


def _build_heads(width: int, classes: int, count: int, device: torch.device) -> nn.ModuleList:
    heads = [nn.Linear(width, classes).to(device) for _ in range(count)]
    for head in heads:
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    return nn.ModuleList(heads)
