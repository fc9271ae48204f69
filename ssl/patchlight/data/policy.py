"""Crop policies, and the random numbers of every augmentation as tables: drawn here, applied by the loaders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from patchlight_kernels import JITTER_ORDERS

from ..checks import check, check_number, check_numbers, check_tuple
from .random_numbers import CROPS, random_uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ATTEMPTS = 10  # boxes tried before the largest centered box of an allowed ratio is taken
_FIELDS = 2 * _ATTEMPTS + 13  # random numbers per crop


@dataclass(frozen=True, slots=True)
class Photometric:
    """Changes of color and sharpness, in this order; a probability of 0 turns a change off."""

    jitter: float = 0.8  # probability of brightness, contrast, saturation and hue, in random order
    brightness: float = 0.4  # factor 1 +- this
    contrast: float = 0.4  # factor 1 +- this, around the image's mean gray
    saturation: float = 0.2  # factor 1 +- this
    hue: float = 0.1  # +- this part of the color circle
    gray: float = 0.2  # probability
    blur: float = 0.5  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # uniform, in pixels of the crop
    solarize: float = 0.0  # probability of inverting values of 128 and more

    def __post_init__(self):
        probabilities = ("jitter", "gray", "blur", "solarize")
        check_numbers(self, **dict.fromkeys((*probabilities, "brightness", "contrast", "saturation"), "[0, 1]"))
        check_numbers(self, hue="[0, 0.5]")
        # 4 is where the blur's kernel ends
        check_tuple("Photometric.blur_sigma", self.blur_sigma, 2, "(0, 4]", ascending=True)


UNCHANGED = Photometric(jitter=0.0, gray=0.0, blur=0.0)


@dataclass(frozen=True, slots=True)
class CropSpec:
    """`count` crops by the same rule: a random box, resized (bicubic, antialiased) to size x size, then flip and color."""

    count: int
    size: int
    scale: tuple[float, float]  # part of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5  # probability
    photometric: Photometric = Photometric()

    def __post_init__(self):
        check_number("CropSpec.count", self.count, "[1, inf)", "leave the rule out for no crops", whole=True)
        check_number("CropSpec.size", self.size, "[1, inf)", "224 and 96 are usual", whole=True)
        check_numbers(self, flip="[0, 1]")
        check_tuple("CropSpec.scale", self.scale, 2, "(0, 1]", ascending=True)
        check_tuple("CropSpec.ratio", self.ratio, 2, "(0, inf)", ascending=True)


@dataclass(frozen=True, slots=True)
class CropPolicy:
    """Which crops a batch consists of. All crops of one kind share a size."""

    global_crops: tuple[CropSpec, ...]
    local_crops: tuple[CropSpec, ...] = ()
    query_crops: tuple[CropSpec, ...] = ()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self):
        check(len(self.global_crops) > 0, "CropPolicy: at least one global crop is needed", "none", "add a CropSpec")
        for kind, specs in self.kinds():
            sizes = [spec.size for spec in specs]
            check(len(set(sizes)) == 1, f"CropPolicy: all {kind} must share one size", sizes, "make them equal")
        check_tuple("CropPolicy.mean", self.mean, 3, "(-inf, inf)")
        check_tuple("CropPolicy.std", self.std, 3, "(0, inf)")

    def kinds(self) -> list[tuple[str, tuple[CropSpec, ...]]]:
        """The kinds of crops that exist, by their names in Views."""
        kinds = [(kind, getattr(self, kind)) for kind in ("global_crops", "local_crops", "query_crops")]
        return [(kind, specs) for kind, specs in kinds if specs]

    @property
    def pixels_per_image(self) -> int:
        """Pixels of all crops of one image."""
        return sum(spec.count * spec.size**2 for _, specs in self.kinds() for spec in specs)


def dino_policy(
    local_count: int = 8,
    global_size: int = 224,
    local_size: int = 96,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
) -> CropPolicy:
    """DINO's two global crops (the second seldom blurred, sometimes solarized) and `local_count` local crops."""
    first = CropSpec(1, global_size, global_scale, photometric=Photometric(blur=1.0))
    second = replace(first, photometric=Photometric(blur=0.1, solarize=0.2))
    local = CropSpec(local_count, local_size, local_scale) if local_count else None
    return CropPolicy((first, second), (local,) if local else ())


def selfpatch_policy(local_count: int = 8, global_size: int = 224, local_size: int = 96) -> CropPolicy:
    """DINO's crops with SelfPatch's areas: 0.25-1 and 0.05-0.25."""
    return dino_policy(local_count, global_size, local_size, (0.25, 1.0), (0.05, 0.25))


def ibot_policy(
    local_count: int = 0,
    global_size: int = 224,
    local_size: int = 96,
    global_scale: tuple[float, float] = (0.14, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
) -> CropPolicy:
    """iBOT's crops at its defaults; its ViT-S run has local_count=10, scales (0.25, 1) and (0.05, 0.25)."""
    return dino_policy(local_count, global_size, local_size, global_scale, local_scale)


def pqcl_policy(
    query_count: int = 1,
    query_size: int = 96,
    query_scale: tuple[float, float] = (0.05, 0.25),
    query_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    global_size: int = 224,
    global_scale: tuple[float, float] = (0.25, 1.0),
    asymmetric: bool = True,
) -> CropPolicy:
    """PQCL's crops: two global crops and `query_count` query crops, which are never mirrored; no local crops.

    asymmetric: the second global crop is seldom blurred and sometimes solarized, as in BYOL, which the paper follows.
        False draws both as the first crop, as the released code does.
    """
    crops = dino_policy(0, global_size, global_scale=global_scale).global_crops
    query = CropSpec(query_count, query_size, query_scale, query_ratio, flip=0.0)
    return CropPolicy(crops if asymmetric else crops[:1] * 2, query_crops=(query,))


@dataclass(frozen=True, slots=True)
class CropTable:
    """All random numbers of V crops of B images, as boxes, factors and choices."""

    size: int
    box: np.ndarray  # [V, B, 4] int64: x, y, w, h in source pixels
    flip: np.ndarray  # [V, B] bool
    brightness: np.ndarray  # [V, B] fp32 factor, 1: unchanged
    contrast: np.ndarray  # [V, B] fp32 factor, 1: unchanged
    saturation: np.ndarray  # [V, B] fp32 factor, 1: unchanged
    hue: np.ndarray  # [V, B] fp32 turns, 0: unchanged
    order: np.ndarray  # [V, B] int64 row of patchlight_kernels.JITTER_ORDERS
    gray: np.ndarray  # [V, B] bool
    sigma: np.ndarray  # [V, B] fp32, 0: no blur
    solarize: np.ndarray  # [V, B] bool


def sample_crops(policy: CropPolicy, seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> dict[str, CropTable]:
    """Samples the crops of images ids [B] with sizes [B, 2] (width, height): one table per kind of crop.

    An image's rows depend on seed, epoch and its id alone.
    """
    tables = {}
    for kind, specs in policy.kinds():
        number = ("global_crops", "local_crops", "query_crops").index(kind)
        crops = np.arange(sum(spec.count for spec in specs))[:, None, None]
        u = random_uniform(seed, CROPS, epoch, np.asarray(ids)[:, None], number, crops, np.arange(_FIELDS))
        tables[kind] = _table([spec for spec in specs for _ in range(spec.count)], u, np.asarray(sizes))
    return tables


def _table(specs: Sequence[CropSpec], u: np.ndarray, sizes: np.ndarray) -> CropTable:
    """From uniform numbers u [V, B, fields] to crops."""

    def column(values: list[float]) -> np.ndarray:
        return np.array(values)[:, None]  # [V, 1]

    changes = [spec.photometric for spec in specs]
    boxes, rest = u[..., : 2 * _ATTEMPTS + 2], u[..., 2 * _ATTEMPTS + 2 :]
    flip, jitter, brightness, contrast, saturation, hue, order, gray, blur, sigma, solarize = np.moveaxis(rest, -1, 0)
    jittered = jitter < column([p.jitter for p in changes])

    def factor(uniform: np.ndarray, strengths: list[float], neutral: float) -> np.ndarray:
        return np.where(jittered, neutral + (2 * uniform - 1) * column(strengths), neutral).astype(np.float32)

    low, high = column([p.blur_sigma[0] for p in changes]), column([p.blur_sigma[1] for p in changes])
    blurred = blur < column([p.blur for p in changes])
    return CropTable(
        size=specs[0].size,
        box=_boxes(specs, boxes, sizes),
        flip=flip < column([spec.flip for spec in specs]),
        brightness=factor(brightness, [p.brightness for p in changes], 1.0),
        contrast=factor(contrast, [p.contrast for p in changes], 1.0),
        saturation=factor(saturation, [p.saturation for p in changes], 1.0),
        hue=factor(hue, [p.hue for p in changes], 0.0),
        order=(order * len(JITTER_ORDERS)).astype(np.int64),
        gray=gray < column([p.gray for p in changes]),
        sigma=np.where(blurred, low + sigma * (high - low), 0.0).astype(np.float32),
        solarize=solarize < column([p.solarize for p in changes]),
    )


def _boxes(specs: Sequence[CropSpec], u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes [V, B, 4] as torchvision's RandomResizedCrop draws them: the first of ten attempts that fits the image."""

    def column(values: list[float]) -> np.ndarray:
        return np.array(values)[:, None, None]  # [V, 1, 1]

    width, height = (np.broadcast_to(side, u.shape[:2]) for side in (sizes[:, 0], sizes[:, 1]))
    low, high = column([spec.scale[0] for spec in specs]), column([spec.scale[1] for spec in specs])
    narrow, wide = column([spec.ratio[0] for spec in specs]), column([spec.ratio[1] for spec in specs])
    area = (width * height)[..., None] * (low + u[..., :_ATTEMPTS] * (high - low))
    aspect = np.exp(np.log(narrow) + u[..., _ATTEMPTS : 2 * _ATTEMPTS] * (np.log(wide) - np.log(narrow)))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [V, B, attempts]
    fits = (w > 0) & (w <= width[..., None]) & (h > 0) & (h <= height[..., None])
    first = fits.argmax(-1)[..., None]
    w, h = np.take_along_axis(w, first, -1)[..., 0], np.take_along_axis(h, first, -1)[..., 0]
    x = np.floor(u[..., -2] * (width - w + 1))
    y = np.floor(u[..., -1] * (height - h + 1))
    nearest = _nearest_ratio(width, height, narrow[..., 0], wide[..., 0])
    box = np.where(fits.any(-1)[..., None], np.stack([x, y, w, h], -1), nearest)
    return box.astype(np.int64)


def _nearest_ratio(width: np.ndarray, height: np.ndarray, narrow: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """The largest centered box [V, B, 4] of an allowed ratio."""
    w = np.maximum(np.minimum(width, np.rint(height * wide)), 1)
    h = np.maximum(np.minimum(height, np.rint(width / narrow)), 1)
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], -1)
