"""The settings of segmentation heads, a class per head; `settings.py` says which of them are published for which data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...backbones.interface import MAP_BLOCKS
from ...checks import check, check_choice, check_numbers, check_tuple
from ..encoder import Encoder
from .features import MAPS, NORMED_MAPS, PATCHES, has_one_grid
from .heads import PointwiseHead, SemanticFpnHead, UperNetHead

WHOLE, WINDOWS = "whole", "windows"
_OTHER_WIDTH = 512  # of UPerNet where the backbone is no ViT, as mmsegmentation has it


@dataclass(frozen=True)
class SegmentProtocol:
    """The settings that all heads have."""

    steps: int = 40_000
    """Optimizer steps; 0 where epochs count."""
    epochs: int = 0
    """Passes over the training images, instead of steps."""
    batch: int = 16
    """Images per step over all ranks."""
    optimizer: str = "adamw"
    """adamw, or sgd with momentum 0.9."""
    rate: float = 1e-4
    """Learning rate of the head."""
    min_rate: float = 0.0
    """The rate at the end."""
    schedule: str = "poly"
    """The fall of the rate: poly, a power of the share of steps that are left, or cosine."""
    power: float = 1.0
    """Of poly; 1 is a straight line."""
    warmup: int = 1500
    """Steps over which the rate rises, where steps count."""
    warmup_epochs: int = 0
    """Epochs over which the rate rises, where epochs count."""
    weight_decay: float = 0.05
    """Of all weights but vectors, biases and tokens."""
    layer_decay: float = 1.0
    """Each block's rate is this share of that of the one above it."""
    drop_path: float = 0.0
    """The last block's rate of dropping a residual branch."""
    crop: int = 512
    """Side of the training crops, and of the windows in testing."""
    scales: tuple[float, float] = (0.5, 2.0)
    """Range of a training image's shorter side, in crops, before it is cut."""
    area: tuple[float, float] | None = None
    """Instead of scales: range of the cut's share of the image; the cut is resized to the crop, as in classification."""
    colors: str = "distort"
    """What changes in training: distort (brightness, contrast, saturation, hue), jitter (the same and more of it, with gray and
    blurred images, as in self-supervised pretraining) or none."""
    test: str = WINDOWS
    """whole: images are tested whole, only resized. windows: in overlapping parts of a crop's size, whose scores are averaged."""
    test_short_side: int = 512
    """The shorter side in testing; the aspect ratio stays."""
    long_side: int = 2048
    """The longer side in testing is at most this, and in training in proportion; 0: any."""
    stride: int = 341
    """Pixels between windows in testing."""
    blocks: tuple[int, int, int, int] = MAP_BLOCKS
    """Of a ViT of 12 blocks those whose patches fpn and upernet take; of one of another depth those in the same places."""
    frozen: bool = False
    """Whether the backbone is not trained."""
    seed: int = 0
    """Of order, crops and starts."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        counts = dict.fromkeys(
            ("batch", "crop", "test_short_side", "stride", "channels", "helper_channels"), "[1, inf)"
        )
        shares = dict.fromkeys(("layer_decay",), "(0, 1]") | dict.fromkeys(("drop_path",), "[0, 1)")
        others = dict.fromkeys(
            ("steps", "epochs", "warmup", "warmup_epochs", "long_side", "min_rate", "weight_decay"), "[0, inf)"
        )
        check_numbers(self, **counts, **shares, **others, rate="(0, inf)", power="(0, inf)")
        check_choice(f"{name}.schedule", self.schedule, ("poly", "cosine"))
        check_choice(f"{name}.optimizer", self.optimizer, ("adamw", "sgd"))
        check_choice(f"{name}.colors", self.colors, ("distort", "jitter", "none"))
        check_choice(f"{name}.test", self.test, (WHOLE, WINDOWS))
        check_tuple(f"{name}.scales", self.scales, 2, "(0, inf)", ascending=True)
        if self.area is not None:
            check_tuple(f"{name}.area", self.area, 2, "(0, 1]", ascending=True)
        if self.epochs:
            rule = f"{name}.steps must be 0 where epochs count"
            check(not self.steps, rule, f"{self.steps} and epochs={self.epochs}", "set one of the two to 0")
            check(self.warmup_epochs <= self.epochs, f"{name}.warmup_epochs must lie in [0, epochs]",
                  f"{self.warmup_epochs} of {self.epochs}", "change one of them")  # fmt: skip
        else:
            check(self.steps > 0, f"{name}.steps must be positive where epochs is 0", self.steps, "set one of the two")
            check(not self.warmup_epochs, f"{name}.warmup_epochs must be 0 where steps count",
                  self.warmup_epochs, "use warmup, in steps")  # fmt: skip

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps for a data set of this size."""
        return self.epochs * steps_per_epoch or self.steps

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Steps over which the rate rises."""
        return self.warmup_epochs * steps_per_epoch if self.epochs else self.warmup

    @property
    def features(self) -> str:
        """What the head takes of an encoder: one of the words in `features.py`."""
        return PATCHES

    def build_head(self, encoder: Encoder, classes: int) -> nn.Module:
        """Score maps from features of the encoder."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearSegment(SegmentProtocol):
    """A frozen backbone under BatchNorm and a 1x1 convolution, as in DINOv2. No paper here reports it: our own setting."""

    rate: float = 1e-3
    weight_decay: float = 1e-4
    frozen: bool = True

    def build_head(self, encoder: Encoder, classes: int) -> nn.Module:
        return PointwiseHead(encoder.width, classes, norm=True, std=0.01)


@dataclass(frozen=True)
class ConvSegment(SegmentProtocol):
    """A 1x1 convolution on the patches, everything fine-tuned. The defaults are SERE's for ImageNet-S."""

    steps: int = 0
    epochs: int = 100
    batch: int = 256
    rate: float = 5e-4
    min_rate: float = 1e-6
    schedule: str = "cosine"
    warmup: int = 0
    warmup_epochs: int = 5
    layer_decay: float = 0.5
    drop_path: float = 0.1
    crop: int = 224
    area: tuple[float, float] | None = (0.14, 1.0)
    colors: str = "jitter"
    test: str = WHOLE
    test_short_side: int = 256
    long_side: int = 0

    def build_head(self, encoder: Encoder, classes: int) -> nn.Module:
        return PointwiseHead(encoder.width, classes, norm=False, std=2e-5)


@dataclass(frozen=True)
class FpnSegment(SegmentProtocol):
    """Semantic FPN on four maps of the backbone. The defaults are SelfPatch's for ADE20K."""

    rate: float = 6e-5
    weight_decay: float = 0.01
    drop_path: float = 0.1
    test: str = WHOLE
    channels: int = 128
    """Width of the head."""
    pyramid: bool = False
    """Whether a ViT's maps are made finer and coarser first; those of other backbones always have four scales."""
    blocks: tuple[int, int, int, int] = (3, 6, 9, 12)

    @property
    def features(self) -> str:
        return MAPS

    def build_head(self, encoder: Encoder, classes: int) -> nn.Module:
        return SemanticFpnHead(encoder.map_levels, classes, self.channels, self.pyramid)


@dataclass(frozen=True)
class UperNetSegment(SegmentProtocol):
    """UPerNet on four maps of the backbone. The defaults are iBOT's for ADE20K, which SERE follows."""

    steps: int = 160_000
    rate: float = 3e-5
    layer_decay: float = 0.9
    drop_path: float = 0.1
    channels: int | None = None
    """Width of the head; None: that of a ViT, 512 on other backbones."""
    helper_channels: int = 256
    """Width of the auxiliary head, which is part of training only."""
    norm: bool = True
    """Whether a ViT's maps go through its final norm."""

    @property
    def features(self) -> str:
        return NORMED_MAPS if self.norm else MAPS

    def build_head(self, encoder: Encoder, classes: int) -> nn.Module:
        own = encoder.width if has_one_grid(encoder.map_levels) else _OTHER_WIDTH
        return UperNetHead(encoder.map_levels, classes, self.channels or own, self.helper_channels)


HEADS = {"linear": LinearSegment, "conv": ConvSegment, "fpn": FpnSegment, "upernet": UperNetSegment}


def head_name(protocol: SegmentProtocol) -> str:
    """The word that the command line has for its head."""
    return next(name for name, kind in HEADS.items() if kind is type(protocol))
