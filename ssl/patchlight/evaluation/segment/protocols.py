"""The published settings of segmentation with patch features, one per head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...checks import check_choice, check_positive
from .heads import PointwiseHead, SemanticFpnHead, UperNetHead


@dataclass(frozen=True)
class SegmentProtocol:
    """The settings that all heads have. The defaults of each head's own protocol are its published setting."""

    steps: int = 40_000
    """Optimizer steps."""
    batch: int = 16
    """Images per step over all ranks."""
    rate: float = 1e-4
    """Learning rate of the head."""
    min_rate: float = 0.0
    """The rate at the end."""
    schedule: str = "poly"
    """The fall of the rate: poly, a straight line, or cosine."""
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
    """The shorter side in testing; the aspect ratio stays."""
    stride: int = 341
    """Pixels between windows in testing."""
    channels: int = 512
    """Width of the head."""
    frozen: bool = False
    """Whether the backbone is not trained."""
    seed: int = 0
    """Of order, crops and starts."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("steps", "batch", "rate", "crop", "test_short_side", "stride", "channels"):
            check_positive(f"{name}.{field}", getattr(self, field), "the published value is the default")
        check_choice(f"{name}.schedule", self.schedule, ("poly", "cosine"))

    def build_head(self, width: int, classes: int) -> nn.Module:
        """Score maps from the four levels of an encoder."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearSegment(SegmentProtocol):
    """A frozen backbone under BatchNorm and a 1x1 convolution, as in iBOT and DINOv2. Steps and rate are our own choice."""

    rate: float = 1e-3
    """Learning rate of the head."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    drop_path: float = 0.0
    """0: the backbone is frozen."""
    layer_decay: float = 1.0
    """Without effect: the backbone is frozen."""
    frozen: bool = True
    """The backbone is not trained."""

    def build_head(self, width: int, classes: int) -> nn.Module:
        return PointwiseHead(width, classes, norm=True)


@dataclass(frozen=True)
class ConvSegment(SegmentProtocol):
    """SERE's ImageNet-S setting: a 1x1 convolution, everything fine-tuned; 100 epochs of 9190 images in batches of 256."""

    steps: int = 3_500
    """100 epochs of ImageNet-S's 9190 labeled images."""
    batch: int = 256
    """Images per step over all ranks."""
    rate: float = 5e-4
    """Learning rate of the head."""
    min_rate: float = 1e-6
    """The rate at the end."""
    schedule: str = "cosine"
    """Half a cosine."""
    warmup: int = 175
    """5 epochs."""
    layer_decay: float = 0.5
    """Each block's rate is this share of that of the one above it."""
    crop: int = 224
    """Side of the training crops, and of the windows in testing."""
    scales: tuple[float, float] = (1.0, 2.0)
    """Not stated; our own choice."""
    distort: bool = False
    """Not stated."""
    test_short_side: int = 256
    """The shorter side in testing."""
    stride: int = 224
    """Pixels between windows in testing."""

    def build_head(self, width: int, classes: int) -> nn.Module:
        return PointwiseHead(width, classes, norm=False)


@dataclass(frozen=True)
class FpnSegment(SegmentProtocol):
    """SelfPatch's ADE20K setting: Semantic FPN, 40k steps, whole images. Rates, which it does not state, are UPerNet's."""

    stride: int = 512
    """Pixels between windows in testing."""
    channels: int = 128
    """Width of the head."""

    def build_head(self, width: int, classes: int) -> nn.Module:
        return SemanticFpnHead(width, classes, self.channels)


@dataclass(frozen=True)
class UperNetSegment(SegmentProtocol):
    """SERE's and PQCL's ADE20K setting: UPerNet, 160k steps of 16 images, following iBOT; VOC 2012 has 20k steps."""

    steps: int = 160_000
    """Optimizer steps."""

    def build_head(self, width: int, classes: int) -> nn.Module:
        return UperNetHead(width, classes, self.channels)


TASKS: dict[type[SegmentProtocol], str] = {
    LinearSegment: "segment-linear",
    ConvSegment: "segment-conv",
    FpnSegment: "segment-fpn",
    UperNetSegment: "segment-upernet",
}
