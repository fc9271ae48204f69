"""The published settings of Mask R-CNN and of Cascade Mask R-CNN on COCO, and those of the procedural scenes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...checks import check, check_choice, check_numbers
from ..images import PROCEDURAL

SCHEDULES = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}  # epochs, and those after which the rate falls (mmdetection)


@dataclass(frozen=True)
class DetectProtocol:
    """What both detectors share. The defaults of each one's own protocol are its published setting."""

    epochs: int = 12
    """Passes over the training images: 12 in schedule 1x, 36 in 3x."""
    milestones: tuple[int, ...] = (8, 11)
    """Epochs after which the learning rate falls to a tenth: 8 and 11 in schedule 1x, 27 and 33 in 3x."""
    batch: int = 16
    """Images per step over all ranks."""
    rate: float = 1e-4
    """Learning rate of AdamW."""
    warmup: int = 500
    """Steps over which the rate rises."""
    weight_decay: float = 0.05
    """Of AdamW; vectors, biases, positions and tokens have none."""
    layer_decay: float = 1.0
    """Each block's rate is this share of that of the one above it."""
    drop_path: float = 0.05
    """The last block's rate of dropping a residual branch."""
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """The shorter side of a training image is one of these, drawn at random (XCiT, iBOT)."""
    long_side: int = 1333
    """The longer side is at most this, in training and in testing."""
    crop_sides: tuple[int, ...] = (400, 500, 600)
    """Half of the training images are first resized to one of these and cut; none: no image is cut."""
    crop: tuple[int, int] = (384, 600)
    """Range of the sides of that cut."""
    test_short_side: int = 800
    """The shorter side in testing."""
    anchor: int = 8
    """An anchor's side, in strides of its map."""
    channels: int = 256
    """Width of the feature pyramid and of the convolutions in heads."""
    hidden: int = 1024
    """Width of the linear layers in heads."""
    proposals: int = 1000
    """Proposals per image that are kept in training; testing keeps at most 1000."""
    samples: int = 512
    """Proposals per image that heads are trained on, at most a quarter of them objects."""
    detections: int = 100
    """Objects found per image at most."""
    least_score: float = 0.05
    """Objects with a lower score are left out."""
    seed: int = 0
    """Of order, crops, samples and starts."""

    def __post_init__(self) -> None:
        at_least_one = dict.fromkeys(
            ("epochs", "batch", "anchor", "channels", "hidden", "proposals", "samples", "detections"), "[1, inf)"
        )
        sides = dict.fromkeys(("long_side", "test_short_side"), "[16, inf)")
        check_numbers(self, **at_least_one, **sides, rate="(0, inf)", warmup="[0, inf)", least_score="[0, 1)")
        name = type(self).__name__
        right = bool(self.short_sides) and min(*self.short_sides, *self.crop_sides, self.crop[0], 16) >= 16
        rule, remedy = f"{name}.short_sides, crop_sides and crop must be 16 or more", "use larger images"
        check(right, rule, (self.short_sides, self.crop_sides, self.crop), remedy)
        check(self.crop[0] <= self.crop[1], f"{name}.crop must be a range", self.crop, "swap the numbers")

    @property
    def overlaps(self) -> tuple[float, ...]:
        """Of each stage, the overlap from which on a proposal is an object."""
        raise NotImplementedError

    @property
    def box_convs(self) -> int:
        """Convolutions of the heads for classes and boxes."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaskRcnnDetect(DetectProtocol):
    """Mask R-CNN as in SelfPatch, PASS and PQCL (Tables 1, 1, 2): COCO, schedule 1x. Numbers that they do not state are those
    of SelfPatch's released configuration, which changes XCiT's: 8 images, half the rate, twice the warm-up."""

    batch: int = 8
    """Images per step over all ranks."""
    rate: float = 5e-5
    """Learning rate of AdamW."""
    warmup: int = 1000
    """Steps over which the rate rises."""

    @property
    def overlaps(self) -> tuple[float, ...]:
        return (0.5,)

    @property
    def box_convs(self) -> int:
        return 0


@dataclass(frozen=True)
class CascadeDetect(DetectProtocol):
    """Cascade Mask R-CNN as in SERE and PQCL (Tables 2): COCO, schedule 1x, 16 images (SERE, 4.2). The other numbers are those
    of iBOT's released configuration for ViT-S/16, which SERE says it follows."""

    layer_decay: float = 0.8
    """Each block's rate is this share of that of the one above it."""
    drop_path: float = 0.1
    """The last block's rate of dropping a residual branch."""
    proposals: int = 2000
    """Proposals per image that are kept in training; testing keeps at most 1000."""

    @property
    def overlaps(self) -> tuple[float, ...]:
        return (0.5, 0.6, 0.7)

    @property
    def box_convs(self) -> int:
        return 4


HEADS: dict[str, type[DetectProtocol]] = {"mask-rcnn": MaskRcnnDetect, "cascade": CascadeDetect}
TASKS: dict[type[DetectProtocol], str] = {kind: f"detect-{name}" for name, kind in HEADS.items()}


def published_detect(kind: type[DetectProtocol], schedule: str, data: str) -> DetectProtocol:
    """A detector's setting in a schedule: the papers' for COCO; our own for the procedural scenes, small enough for a CPU."""
    check_choice("The schedule", schedule, list(SCHEDULES))
    epochs, milestones = SCHEDULES[schedule]
    if data != PROCEDURAL:
        return replace(kind(), epochs=epochs, milestones=milestones)
    return kind(
        epochs=epochs, milestones=milestones, batch=8, rate=1e-3, warmup=20, drop_path=0.0,
        short_sides=(80, 96, 112), long_side=192, crop_sides=(), test_short_side=96, anchor=4, channels=32, hidden=64,
        proposals=200, samples=64, detections=30,
    )  # fmt: skip
