"""Video object segmentation of a folder in DAVIS layout: the first frame's mask is carried on by patch features alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...data.stored import EXTENSIONS, decode
from ..encoder import Encoder
from ..progress import progress
from ..ranks import Ranks
from ..sheets import PALETTE
from .previews import draw_sheet, save_preview
from .propagation import Propagation, propagate, to_label_map
from .scores import VOID, SequenceScores, score_sequence, summarize

_UNIT = 64  # the longer side is cut down to a multiple of this


@dataclass(frozen=True)
class DavisProtocol:
    """DINO's protocol, which SelfPatch and PQCL follow."""

    propagation: Propagation = field(default_factory=Propagation)
    """How labels travel."""
    short_side: int = 480
    """The shorter side of a frame; the longer one becomes the multiple of 64 below."""
    std: tuple[float, float, float] | None = (0.228, 0.224, 0.225)
    """The colors' spread as the released code has it (0.228 for red is a slip that all published numbers share); null: the
    checkpoint's own. The mean is the checkpoint's own."""
    layer: int = -1
    """The block whose patches are compared, through the final norm."""

    def __post_init__(self) -> None:
        if self.short_side < 16:
            raise ValueError(
                f"DavisProtocol.short_side must be 16 or more, got {self.short_side}; the protocol's is 480."
            )


@dataclass(frozen=True)
class Sequence:
    """A video: its frames, and the masks that are there."""

    name: str
    frames: tuple[Path, ...]
    masks: dict[str, Path]  # by the frame's stem

    def truth(self, size: tuple[int, int]) -> np.ndarray | None:
        """Label maps [T, H, W] of all frames; None if only the first one is annotated."""
        missing = [frame.stem for frame in self.frames if frame.stem not in self.masks]
        if len(missing) == len(self.frames) - 1:
            return None
        if missing:
            raise ValueError(
                f"{self.name}: every frame must have a mask, or the first one only, got none for {len(missing)} of"
                f" {len(self.frames)} frames, such as {missing[0]}; complete the annotations or keep the first one."
            )
        maps = [read_labels(self.masks[frame.stem]) for frame in self.frames]
        for frame, labels in zip(self.frames, maps, strict=True):
            if labels.shape != size:
                raise ValueError(
                    f"{self.name}: frames and masks must have one size, got {labels.shape} for the mask of {frame.name} and"
                    f" {size} for the first frame; resize one of them."
                )
        stacked = np.stack(maps)
        known, found = (set(np.unique(part)) - {VOID} for part in (stacked[0], stacked))
        if found - known:
            late = min(found - known)
            when = self.frames[int(np.flatnonzero((stacked == late).any((1, 2)))[0])].name
            raise ValueError(
                f"{self.name}: the first frame must show every object, got object {late} from {when} on; begin the"
                " sequence there, or take the object out."
            )
        return stacked


class DavisFolder:
    """JPEGImages/<resolution>/<sequence>/, Annotations/ alike, and ImageSets/ with lists of names, if there."""

    def __init__(self, root: str | Path, split: str = "val", resolution: str = "480p") -> None:
        self.root, self.split = Path(root), split
        images, masks = (self._part(name, resolution) for name in ("JPEGImages", "Annotations"))
        self.images, self.masks = images, masks

    def _part(self, name: str, resolution: str) -> Path:
        folder = self.root / name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"A folder in DAVIS layout must hold JPEGImages and Annotations, got no {name} in {self.root}; check the"
                " path."
            )
        return folder / resolution if (folder / resolution).is_dir() else folder

    @cached_property
    def names(self) -> list[str]:
        """The sequences of the split; all there are where no list of that name exists anywhere."""
        lists = (
            sorted((self.root / "ImageSets").rglob(f"{self.split}.txt")) if (self.root / "ImageSets").is_dir() else []
        )
        others = sorted((self.root / "ImageSets").rglob("*.txt"))
        if others and not lists:
            raise FileNotFoundError(
                f"The split must be listed in ImageSets, got {self.split!r} where there are"
                f" {', '.join(sorted({p.stem for p in others}))}; pass one of them."
            )
        names = [w for line in lists[:1] for w in line.read_text().split()] or sorted(
            p.name for p in self.images.iterdir() if p.is_dir()
        )
        if not names:
            raise FileNotFoundError(f"A folder in DAVIS layout must hold sequences, got none in {self.images}.")
        return names

    def open(self, name: str) -> Sequence:
        """A sequence, checked as far as names go."""
        folder = self.images / name
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
        if not found:
            raise FileNotFoundError(
                f"{name}: a sequence must have frames, got none in {folder}; check the split's list."
            )
        masks = {p.stem: p for p in sorted((self.masks / name).glob("*.png"))}
        stray = masks.keys() - {frame.stem for frame in found}
        if stray:
            raise ValueError(
                f"{name}: masks must be named like frames, got {sorted(stray)[0]}.png without a frame in"
                f" {self.masks / name}; rename or remove it."
            )
        if found[0].stem not in masks:
            raise FileNotFoundError(
                f"{name}: the first frame must have a mask, got none for {found[0].name} in {self.masks / name}; add it."
            )
        return Sequence(name, tuple(found), masks)


def read_labels(path: Path) -> np.ndarray:
    """A mask as object numbers [H, W] uint8: the palette's numbers, or gray values; colors are refused."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(
                f"A mask must be a palette or gray PNG of object numbers, got mode {image.mode} in {path}; convert it."
            )
        return np.array(image, dtype=np.uint8)


def frame_size(height: int, width: int, short_side: int, patch_size: int) -> tuple[int, int]:
    """Height and width that a frame is resized to: a square counts as wide."""
    short, long = short_side // patch_size * patch_size, int(short_side * max(height, width) / min(height, width))
    unit = _UNIT if _UNIT % patch_size == 0 and long >= _UNIT else patch_size
    long = long // unit * unit
    return (long, short) if height > width else (short, long)


def resize_frame(image: np.ndarray, short_side: int, patch_size: int, mean: tuple, std: tuple) -> Tensor:
    """An image [H, W, 3] uint8 as pixels [3, H', W'], bilinear without antialiasing in 8 bits, as OpenCV does."""
    size = frame_size(*image.shape[:2], short_side, patch_size)
    values = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)[0].round()
    shift, scale = (torch.tensor(c)[:, None, None] * 255 for c in (mean, std))
    return (values - shift) / scale


def first_labels(labels: np.ndarray, rows: int, columns: int) -> Tensor:
    """A label map as one-hot labels of patches [rows, columns, C], C the largest number plus 1; void is background."""
    labels = np.where(labels == VOID, 0, labels).astype(np.uint8)
    small = resize_labels(labels, (rows, columns))
    return F.one_hot(torch.from_numpy(small).long(), int(labels.max()) + 1).float()


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map [H, W] uint8 at another size, nearest."""
    return np.array(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))


@torch.no_grad()
def segment(
    encoder: Encoder, sequence: Sequence, protocol: DavisProtocol, device: torch.device, precision: str = "fp32"
) -> np.ndarray:
    """Label maps [T, H, W] of all frames at their own size; the first one is the given mask."""
    given = read_labels(sequence.masks[sequence.frames[0].stem])
    mean, std = encoder.eyes.mean, protocol.std or encoder.eyes.std
    images = _frames(sequence, given.shape)

    def look() -> Iterator[Tensor]:
        for image in images:
            pixels = resize_frame(image, protocol.short_side, encoder.patch_size, mean, std).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                seen = encoder(pixels[None], layers=() if protocol.layer == -1 else (protocol.layer,))
            patches = seen.patches if protocol.layer == -1 else seen.levels[0].patches
            yield patches[0].float().unflatten(0, seen.grid)

    size = frame_size(*given.shape, protocol.short_side, encoder.patch_size)
    first = first_labels(given, size[0] // encoder.patch_size, size[1] // encoder.patch_size).to(device)
    maps = [given]
    for soft in propagate(look(), first, protocol.propagation):
        maps.append(resize_labels(to_label_map(soft, encoder.patch_size).cpu().numpy(), given.shape))
    return np.stack(maps)


def _frames(sequence: Sequence, size: tuple[int, int]) -> Iterator[np.ndarray]:
    for path in sequence.frames:
        try:
            image = decode(path.read_bytes())
        except (OSError, ValueError) as error:
            raise OSError(f"{sequence.name}: frames must be readable, got {error} for {path}; repair it.") from error
        if image.shape[:2] != size:
            raise ValueError(
                f"{sequence.name}: frames and masks must have one size, got {image.shape[:2]} for {path.name} and"
                f" {size} for the first mask; resize one of them."
            )
        yield image


@dataclass(frozen=True)
class DavisResult:
    """What came out, and what could not be done."""

    scores: dict[str, SequenceScores]
    unscored: tuple[str, ...]  # sequences with a first mask only: segmented, not scored
    failed: dict[str, str]  # sequences and why

    def metrics(self) -> dict[str, float]:
        return summarize(self.scores) if self.scores else {}

    def per_object(self) -> dict[str, dict]:
        """Mean, recall and decay of J and F of each object."""
        return {
            f"{name}_{number}": {f"{m}_{k}": v for m, s in zip("JF", pair, strict=True) for k, v in vars(s).items()}
            for name, scores in self.scores.items()
            for number, pair in enumerate(scores.statistics(), 1)
        }


def evaluate_davis(
    encoder: Encoder,
    folder: DavisFolder,
    protocol: DavisProtocol,
    ranks: Ranks,
    out: Path,
    precision: str = "fp32",
    previews: int = 4,
) -> DavisResult:
    """Segments and scores every sequence; a sequence that cannot be done is named, and the others go on.

    Writes into `out`: masks/<sequence>/<frame>.png, and for the first sequences an animated preview and a sheet.
    """
    scores, unscored, failed = {}, [], {}
    mine = [folder.names[i] for i in ranks.share(len(folder.names))]
    for name in progress(mine, "sequences") if ranks.rank == 0 else mine:
        try:
            sequence = folder.open(name)
            size = read_labels(sequence.masks[sequence.frames[0].stem]).shape
            truth = sequence.truth(size)
            result = segment(encoder, sequence, protocol, ranks.device, precision)
            _save_masks(result, sequence, out / "masks" / name)
            if folder.names.index(name) < previews:
                save_preview(sequence.frames, result, out / f"{name}.webp")
                draw_sheet(sequence.frames, result, truth).save(out / f"{name}.png")
            if truth is None:
                unscored.append(name)
            else:
                scores[name] = score_sequence(truth, result)
        except (ValueError, OSError) as error:
            failed[name] = str(error)
    parts = ranks.gather((scores, unscored, failed))
    return DavisResult(
        {n: s for part in parts for n, s in part[0].items()},
        tuple(n for part in parts for n in part[1]),
        {n: e for part in parts for n, e in part[2].items()},
    )


def _save_masks(labels: np.ndarray, sequence: Sequence, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for frame, label_map in zip(sequence.frames, labels, strict=True):
        image = Image.fromarray(label_map, mode="P")
        image.putpalette(PALETTE.flatten().tolist())
        image.save(folder / f"{frame.stem}.png")
