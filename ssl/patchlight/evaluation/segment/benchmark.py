"""Semantic segmentation with patch features: a frozen linear layer, or fine-tuning under a 1x1, Semantic FPN or UPerNet head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..encoder import Encoder, set_drop_path
from ..features import Reading
from ..progress import progress
from ..ranks import Ranks
from ..sheets import overlay, tile
from ..training import (
    Batches,
    average_gradients,
    cosine_rate,
    layer_groups,
    poly_rate,
    set_rate,
    share_start,
    training_loader,
)
from .heads import PointwiseHead, SemanticFpnHead, UperNetHead, resized
from .scenes import IGNORE, Scenes, SceneSource

_PICTURES = 4
_MOST_SCORES = 1 << 27  # floats of one image's class scores that are enlarged at a time


@dataclass(frozen=True)
class SegmentProtocol:
    """What all heads have in common; the fields of each head's own protocol are its published setting."""

    steps: int = 40_000
    """Optimizer steps."""
    batch: int = 16
    """Images per step over all ranks."""
    rate: float = 1e-4
    """Learning rate of the head."""
    min_rate: float = 0.0
    """Where it ends."""
    schedule: str = "poly"
    """poly: a straight fall; cosine."""
    warmup: int = 1500
    """Steps over which the rate rises."""
    weight_decay: float = 0.05
    """Of AdamW."""
    layer_decay: float = 0.65
    """Each block's rate is this share of that of the one above it."""
    drop_path: float = 0.1
    """The last block's rate of dropping a residual branch."""
    crop: int = 512
    """Side of the training crops, and of the windows in testing."""
    scales: tuple[float, float] = (0.5, 2.0)
    """Range of a training image's shorter side, in crops, before it is cut."""
    distort: bool = True
    """Whether brightness, contrast, saturation and hue change in training."""
    test_short_side: int = 512
    """The shorter side in testing; the shape stays."""
    stride: int = 341
    """Pixels between windows in testing."""
    channels: int = 512
    """Width of the head."""
    frozen: bool = False
    """Whether the backbone stays as it is."""
    seed: int = 0
    """Of order, crops and starts."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rate", "crop", "test_short_side", "stride", "channels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{type(self).__name__}.{name} must be positive, got {getattr(self, name)}.")
        if self.schedule not in ("poly", "cosine"):
            raise ValueError(f"{type(self).__name__}.schedule must be poly or cosine, got {self.schedule!r}.")

    def head(self, width: int, classes: int) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class SegmentResult:
    """What came out."""

    metrics: dict[str, float]
    absent: tuple[int, ...]  # classes that no test scene shows; they count neither way unless they are found
    pictures: tuple[
        tuple[np.ndarray, np.ndarray, np.ndarray], ...
    ]  # image, found classes, true classes of a few scenes


@dataclass(frozen=True)
class LinearSegment(SegmentProtocol):
    """A frozen backbone under BatchNorm and a 1x1 convolution, as iBOT's and DINOv2's linear segmentation. Steps, rate ours."""

    rate: float = 1e-3
    """Learning rate of the head."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    drop_path: float = 0.0
    """None: the backbone is frozen."""
    layer_decay: float = 1.0
    """Without effect: the backbone is frozen."""
    frozen: bool = True
    """The backbone stays as it is."""

    def head(self, width: int, classes: int) -> nn.Module:
        return PointwiseHead(width, classes, norm=True)


@dataclass(frozen=True)
class ConvSegment(SegmentProtocol):
    """SERE's ImageNet-S setting: a 1x1 convolution, everything fine-tuned; 100 epochs of 9190 images in batches of 256."""

    steps: int = 3_500
    """100 epochs of ImageNet-S's 9190 labelled images."""
    batch: int = 256
    """Images per step over all ranks."""
    rate: float = 5e-4
    """Learning rate of the head."""
    min_rate: float = 1e-6
    """Where it ends."""
    schedule: str = "cosine"
    """Half a cosine."""
    warmup: int = 175
    """5 epochs."""
    layer_decay: float = 0.5
    """Each block's rate is this share of that of the one above it."""
    crop: int = 224
    """Side of the training crops, and of the windows in testing."""
    scales: tuple[float, float] = (1.0, 2.0)
    """Not stated; ours."""
    distort: bool = False
    """Not stated."""
    test_short_side: int = 256
    """The shorter side in testing."""
    stride: int = 224
    """Pixels between windows in testing."""

    def head(self, width: int, classes: int) -> nn.Module:
        return PointwiseHead(width, classes, norm=False)


@dataclass(frozen=True)
class FpnSegment(SegmentProtocol):
    """SelfPatch's ADE20K setting: Semantic FPN, 40k steps, whole images. Rates, which it does not state, are UPerNet's."""

    stride: int = 512
    """Pixels between windows in testing."""
    channels: int = 128
    """Width of the head."""

    def head(self, width: int, classes: int) -> nn.Module:
        return SemanticFpnHead(width, classes, self.channels)


@dataclass(frozen=True)
class UperNetSegment(SegmentProtocol):
    """SERE's and PQCL's ADE20K setting: UPerNet, 160k steps of 16 images, following iBOT; VOC 2012 has 20k steps."""

    steps: int = 160_000
    """Optimizer steps."""

    def head(self, width: int, classes: int) -> nn.Module:
        return UperNetHead(width, classes, self.channels)


TASKS = {
    LinearSegment: "segment-linear",
    ConvSegment: "segment-conv",
    FpnSegment: "segment-fpn",
    UperNetSegment: "segment-upernet",
}


class Segmenter(nn.Module):
    """An encoder and a head over four of its levels, evenly spread."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        depth = encoder.depth
        self.layers = tuple(max(0, round(depth * (i + 1) / 4) - 1) for i in range(4))

    def forward(self, pixels: Tensor, frozen: bool = False) -> tuple[Tensor, ...]:
        """Score maps [B, C, h, w] of any resolution for pixels [B, 3, H, W]; sides are padded to whole patches."""
        patch = self.encoder.patch_size
        pixels = F.pad(pixels, (0, -pixels.shape[-1] % patch, 0, -pixels.shape[-2] % patch))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            seen = self.encoder(pixels, self.layers)
        return self.head([level.patches.transpose(1, 2).unflatten(2, seen.grid) for level in seen.levels])


class TrainingScenes(Dataset):
    """Scenes resized, cut, mirrored and recolored at random: pixels [3, crop, crop] uint8, classes [crop, crop] int64."""

    def __init__(self, source: SceneSource, protocol: SegmentProtocol) -> None:
        self.source, self.protocol = source, protocol
        self.recolor = v2.RandomPhotometricDistort() if protocol.distort else nn.Identity()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        scene, crop = self.source.read(item), self.protocol.crop
        image = tv_tensors.Image(torch.from_numpy(scene.image).permute(2, 0, 1))
        classes = tv_tensors.Mask(torch.from_numpy(scene.classes)[None])
        low, high = self.protocol.scales
        short = max(1, round(crop * float(torch.empty(()).uniform_(low, high))))
        image, classes = v2.functional.resize(image, [short]), v2.functional.resize(classes, [short])
        bottom, right = (max(0, crop - side) for side in image.shape[-2:])
        image = F.pad(image, (0, right, 0, bottom))
        classes = F.pad(classes, (0, right, 0, bottom), value=IGNORE)
        for _ in range(10):  # mmsegmentation's rule: one class may fill three quarters of a crop at most
            y, x = (int(torch.randint(0, side - crop + 1, ())) for side in image.shape[-2:])
            part = classes[0, y : y + crop, x : x + crop]
            counts = part[part != IGNORE].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        image = image[:, y : y + crop, x : x + crop]
        if torch.rand(()) < 0.5:
            image, part = image.flip(-1), part.flip(-1)
        return self.recolor(image.as_subclass(Tensor)), part.as_subclass(Tensor).contiguous()


def evaluate_segment(
    encoder: Encoder, data: Scenes, protocol: SegmentProtocol, ranks: Ranks, reading: Reading
) -> SegmentResult:
    """mIoU, aAcc and mAcc on the test scenes after training. The encoder is changed unless it is frozen."""
    device = ranks.device
    torch.manual_seed(protocol.seed)
    model = Segmenter(encoder, protocol.head(encoder.width, data.classes)).to(device)
    share_start(model, ranks)
    torch.manual_seed(protocol.seed + 1 + ranks.rank)
    encoder.requires_grad_(not protocol.frozen)
    set_drop_path(encoder.backbone, protocol.drop_path)
    epochs = -(-protocol.steps // max(1, len(data.train) // min(protocol.batch, len(data.train))))
    batches = Batches(len(data.train), protocol.batch, epochs, ranks, protocol.seed)
    others = nn.ModuleList([encoder.summary, model.head])
    optimizer = torch.optim.AdamW(layer_groups(encoder.backbone, others, protocol.layer_decay, protocol.weight_decay))
    rate_of = {"poly": poly_rate, "cosine": cosine_rate}[protocol.schedule]
    loader = training_loader(TrainingScenes(data.train, protocol), batches, reading.workers, device)
    model.train()
    encoder.train(not protocol.frozen)
    steps = progress(range(protocol.steps), "segmentation") if ranks.rank == 0 else range(protocol.steps)
    for step, (images, classes) in zip(steps, loader, strict=False):
        set_rate(optimizer, rate_of(step, protocol.steps, protocol.rate, protocol.min_rate, protocol.warmup))
        with torch.autocast(device.type, torch.bfloat16, enabled=reading.precision == "bf16"):
            maps = model(encoder.normalize(images.to(device, non_blocking=True)), protocol.frozen)
        loss = segmentation_loss(maps, classes.to(device))
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, ranks)
        optimizer.step()
    model.eval()
    confusion = torch.zeros(data.classes, data.classes, dtype=torch.int64)
    mine, pictures = ranks.share(len(data.test)), []
    for number in progress(mine, "test scenes") if ranks.rank == 0 else mine:
        scene = data.test.read(int(number))
        found = predict(model, scene.image, protocol, device, reading.precision)
        confusion += confusion_of(torch.from_numpy(scene.classes), torch.from_numpy(found), data.classes)
        if len(pictures) < _PICTURES:
            pictures.append((scene.image, found, scene.classes))
    confusion = ranks.sum(confusion.to(device)).cpu()
    absent = (confusion.sum(1) == 0).nonzero()[:, 0].tolist()
    return SegmentResult(scores_of(confusion), tuple(absent), tuple(pictures))


def segmentation_loss(maps: tuple[Tensor, ...], classes: Tensor) -> Tensor:
    """Cross-entropy of the first map at full size, and 0.4 of that of helpers; 0 if no pixel has a class."""
    losses = [
        F.cross_entropy(resized(m.float(), classes.shape[-2:]), classes, ignore_index=IGNORE, reduction="sum")
        for m in maps
    ]
    known = (classes != IGNORE).sum().clamp_min(1)
    return (losses[0] + 0.4 * sum(losses[1:])) / known


@torch.no_grad()
def predict(
    model: Segmenter, image: np.ndarray, protocol: SegmentProtocol, device: torch.device, precision: str
) -> np.ndarray:
    """The class of every pixel [H, W] int64: scores of overlapping windows are averaged at the test size, then enlarged."""
    pixels = v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), [protocol.test_short_side])
    pixels = model.encoder.normalize(pixels.to(device)[None])
    height, width = pixels.shape[-2:]
    total: Tensor | None = None
    count = torch.zeros(height, width, device=device)
    for y in starts(height, protocol.crop, protocol.stride):
        for x in starts(width, protocol.crop, protocol.stride):
            window = pixels[..., y : y + protocol.crop, x : x + protocol.crop]
            size = window.shape[-2:]
            patch = model.encoder.patch_size
            padded = tuple(side + -side % patch for side in size)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                scores = model(window)[0]
            scores = resized(scores.float(), padded)[0, :, : size[0], : size[1]]
            if total is None:
                total = scores.new_zeros(len(scores), height, width)
            total[:, y : y + size[0], x : x + size[1]] += scores
            count[y : y + size[0], x : x + size[1]] += 1
    return best_class(total / count, image.shape[:2]).cpu().numpy()


def starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin so that they cover a side; the last one ends with it."""
    return sorted({min(start, max(0, side - crop)) for start in range(0, max(1, side - crop + stride), stride)})


def best_class(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class [H, W] of scores [C, h, w] enlarged to a size, some classes at a time, so that memory is bounded."""
    at_once = max(1, _MOST_SCORES // (size[0] * size[1]))
    best = winner = None
    for first in range(0, len(scores), at_once):
        value, index = resized(scores[None, first : first + at_once], size)[0].max(0)
        if best is None:
            best, winner = value, index
        else:
            better = value > best
            best, winner = torch.where(better, value, best), torch.where(better, index + first, winner)
    return winner


def confusion_of(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """How many pixels of each true class (rows) are found as which (columns), [C, C] int64."""
    known = truth != IGNORE
    return torch.bincount(truth[known] * classes + found[known], minlength=classes**2).view(classes, classes)


def scores_of(confusion: Tensor) -> dict[str, float]:
    """mIoU over the classes that are there or are found, mAcc over those that are there, aAcc over pixels."""
    right, there, found = confusion.diag().double(), confusion.sum(1).double(), confusion.sum(0).double()
    union = there + found - right
    if not there.sum():
        raise ValueError("Segmentation scores need a pixel with a class, got none in all test scenes; check the masks.")
    return {
        "mIoU": (right / union)[union > 0].mean().item(),
        "aAcc": (right.sum() / there.sum()).item(),
        "mAcc": (right / there)[there > 0].mean().item(),
    }


def draw_segments(pictures: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]) -> Image.Image:
    """A row per scene: as it is, as found, as it truly is."""
    rows = []
    for image, found, truth in pictures:
        size = (256, round(256 * image.shape[0] / image.shape[1]))
        shown = [image, overlay(image, found % 256), overlay(image, np.where(truth == IGNORE, 0, truth) % 256)]
        rows.append([Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in shown])
    return tile(rows)
