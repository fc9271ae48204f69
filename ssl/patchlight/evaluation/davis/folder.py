"""A folder in DAVIS layout: its sequences, their frames and their masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ...checks import check, sentence
from ...data.stored import EXTENSIONS, decode
from ..sheets import PALETTE
from .scores import VOID


@dataclass(frozen=True)
class VideoSequence:
    """A video: its frames, and the masks that exist."""

    name: str
    frames: tuple[Path, ...]
    masks: dict[str, Path]  # by the frame's stem

    def first_mask(self) -> np.ndarray:
        """The label map [H, W] of the first frame, which is given."""
        return read_labels(self.masks[self.frames[0].stem])

    def truth(self, size: tuple[int, int]) -> np.ndarray | None:
        """Label maps [T, H, W] of all frames; None if only the first one is annotated."""
        missing = [frame.stem for frame in self.frames if frame.stem not in self.masks]
        if len(missing) == len(self.frames) - 1:
            return None
        if missing:
            rule = f"{self.name}: every frame must have a mask, or the first one only"
            got = f"none for {len(missing)} of {len(self.frames)} frames, such as {missing[0]}"
            raise ValueError(sentence(rule, got, "complete the annotations or keep the first one"))
        maps = [read_labels(self.masks[frame.stem]) for frame in self.frames]
        for frame, labels in zip(self.frames, maps, strict=True):
            check(
                labels.shape == size,
                f"{self.name}: frames and masks must have one size",
                f"{labels.shape} for the mask of {frame.name} and {size} for the first frame",
                "resize one of them",
            )
        stacked = np.stack(maps)
        self._check_objects(stacked)
        return stacked

    def _check_objects(self, maps: np.ndarray) -> None:
        """Every object must be in the first of the maps [T, H, W]."""
        in_first, in_all = (set(np.unique(part)) - {VOID} for part in (maps[0], maps))
        if in_all - in_first:
            late = min(in_all - in_first)
            frame = self.frames[int(np.flatnonzero((maps == late).any((1, 2)))[0])]
            rule, got = f"{self.name}: the first frame must show every object", f"object {late} from {frame.name} on"
            raise ValueError(sentence(rule, got, "begin the sequence there, or take the object out"))

    def images(self, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """The frames [H, W, 3] uint8, which must have the size of the first mask."""
        for path in self.frames:
            try:
                image = decode(path.read_bytes())
            except (OSError, ValueError) as error:
                rule = f"{self.name}: frames must be readable"
                raise OSError(sentence(rule, f"{error} for {path}", "repair it")) from error
            check(
                image.shape[:2] == size,
                f"{self.name}: frames and masks must have one size",
                f"{image.shape[:2]} for {path.name} and {size} for the first mask",
                "resize one of them",
            )
            yield image


class DavisFolder:
    """JPEGImages/<resolution>/<sequence>/, Annotations/ with the same folders, ImageSets/ with lists of names, if any."""

    def __init__(self, root: str | Path, split: str = "val", resolution: str = "480p") -> None:
        _check_name("The split", split, "--split")
        _check_name("The resolution", resolution, "--resolution")
        self.root, self.split = Path(root), split
        self.images, self.masks = (self._part(name, resolution) for name in ("JPEGImages", "Annotations"))

    def _part(self, name: str, resolution: str) -> Path:
        folder = self.root / name
        if not folder.is_dir():
            rule = "A folder in DAVIS layout must hold JPEGImages and Annotations"
            raise FileNotFoundError(sentence(rule, f"no {name} in {self.root}", "check the path"))
        return folder / resolution if (folder / resolution).is_dir() else folder

    @cached_property
    def names(self) -> list[str]:
        """The sequences that the split's list names; without any list, all sequences."""
        sets = self.root / "ImageSets"
        lists, chosen = (sorted(sets.rglob(f"{name}.txt")) for name in ("*", self.split))
        if lists and not chosen:
            got = f"{self.split!r} where there are {', '.join(sorted({path.stem for path in lists}))}"
            raise FileNotFoundError(sentence("The split must be listed in ImageSets", got, "pass one of them"))
        names = _read_names(chosen[0]) if chosen else []
        names = names or sorted(path.name for path in self.images.iterdir() if path.is_dir())
        if not names:
            rule = "A folder in DAVIS layout must hold sequences"
            raise FileNotFoundError(sentence(rule, f"none in {self.images}", "check the path"))
        return names

    def open(self, name: str) -> VideoSequence:
        """A sequence. Only the names of its files are checked here."""
        folder = self.images / name
        frames = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
        if not frames:
            rule = f"{name}: a sequence must have frames"
            raise FileNotFoundError(sentence(rule, f"none in {folder}", "check the split's list"))
        masks = {p.stem: p for p in sorted((self.masks / name).glob("*.png"))}
        without_frame = sorted(masks.keys() - {frame.stem for frame in frames})
        if without_frame:
            got = f"{without_frame[0]}.png without a frame in {self.masks / name}"
            raise ValueError(sentence(f"{name}: masks must be named like frames", got, "rename or remove it"))
        if frames[0].stem not in masks:
            got = f"none for {frames[0].name} in {self.masks / name}"
            raise FileNotFoundError(sentence(f"{name}: the first frame must have a mask", got, "add it"))
        return VideoSequence(name, tuple(frames), masks)


def _read_names(path: Path) -> list[str]:
    """The sequences in a list. Results are written under these names, so each must be a single name."""
    try:
        names = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        got = f"{error.reason} at byte {error.start} of {path}"
        raise ValueError(sentence("A list of sequences must be UTF-8 text", got, "save it as such")) from error
    for name in names:
        _check_name("A sequence", name, str(path))
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    check(twice is None, "A list must name each sequence once", f"{twice} more than once in {path}", "remove one")
    return names


def _check_name(what: str, name: str, where: str) -> None:
    """A ValueError for a name that could lead out of the folder that it is in."""
    leads_out = name in ("", ".", "..") or not set(name).isdisjoint("/\\:\0")
    got = f"{name!r} in {where}"
    check(not leads_out, f"{what} must be the name of a folder, not a path", got, "name a folder of the data set")


def read_labels(path: Path) -> np.ndarray:
    """A mask as object numbers [H, W] uint8: the palette's numbers, or gray values; colors are refused."""
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.array(image)
    except Exception as error:  # PIL raises errors of many kinds for damaged files
        got = f"{type(error).__name__}: {error} for {path}"
        raise ValueError(sentence("A mask must be a readable PNG", got, "repair it")) from error
    rule = "A mask must be a palette or gray PNG of object numbers"
    check(mode in ("P", "L", "1"), rule, f"mode {mode} in {path}", "convert it")
    return labels.astype(np.uint8)


def save_labels(labels: np.ndarray, sequence: VideoSequence, folder: Path) -> None:
    """Label maps [T, H, W] as <frame>.png in the colors of DAVIS."""
    folder.mkdir(parents=True, exist_ok=True)
    for frame, label_map in zip(sequence.frames, labels, strict=True):
        image = Image.fromarray(label_map, mode="P")
        image.putpalette(PALETTE.flatten().tolist())
        image.save(folder / f"{frame.stem}.png")
