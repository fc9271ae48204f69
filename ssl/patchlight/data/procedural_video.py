"""Videos of the procedural objects with exact masks, in DAVIS layout: objects circle, turn, change size and overlap."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import check, check_new_folder
from .procedural import CLASSES, backgrounds, colors, object_at
from .random_numbers import PROCEDURAL, random_uniform

_OBJECTS, _FIELDS = 3, 14  # per video, random numbers per object
_PAN = 0.25  # the background moves by at most this many image widths
_STEP = 0.55 * math.pi  # objects circle by at most this much over 24 frames


def draw_video(seed: int, number: int, frames: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [T, size, size, 3] uint8 and object numbers [T, size, size] uint8 (0: background), from seed and number alone."""
    check(
        frames >= 3 and size >= 16,
        "draw_video: a video needs 3 frames of 16 pixels or more",
        f"{frames} of {size}",
        "use more",
    )
    u = torch.from_numpy(random_uniform(seed, PROCEDURAL, 3, number, np.arange(_OBJECTS * _FIELDS + 3))).float()
    objects, scene = u[:-3].view(_OBJECTS, _FIELDS), u[-3:]
    time = torch.linspace(0, (frames - 1) / 23, frames)  # the same speed, however long the video is
    image = _panned(seed, number, time / max(1.0, float(time[-1])), scene, size)
    labels = torch.zeros(frames, size, size, dtype=torch.uint8)
    classes = torch.argsort(torch.from_numpy(random_uniform(seed, PROCEDURAL, 4, number, np.arange(len(CLASSES)))))
    for k in range(_OBJECTS):
        distance, texture = _moving(
            int(classes[k]), objects[k], 2 * math.pi * (k / _OBJECTS + float(scene[2])), time, size
        )
        cover = (0.5 - distance * size).clamp_(0, 1)[:, None]
        fill, ink = colors(objects[k : k + 1, 8:14])
        image = image + (fill + (ink - fill) * texture[:, None] - image) * cover
        labels[distance < 0] = k + 1
    pixels = (image.clamp_(0, 1) * 255).round_().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy()


def _moving(number: int, u: Tensor, place: float, time: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """An object in every frame: signed distance and ink, [T, S, S]."""
    swing = (0.4 + 0.6 * u[0]) * _STEP * (1 if u[1] < 0.5 else -1)
    orbit = place + swing * time
    radius = 0.24 + 0.08 * u[2] + 0.05 * torch.sin(2 * math.pi * (u[3] + time))
    half_size = (0.13 + 0.05 * u[4]) * (1 + 0.15 * torch.sin(2 * math.pi * (u[5] + 0.7 * time)))
    angle = (2 * u[6] - 1) * math.pi + (2 * u[7] - 1) * math.pi * time
    x, y = 0.5 + radius * torch.cos(orbit), 0.5 + radius * torch.sin(orbit)
    return object_at(torch.full((len(time),), number), x, y, half_size, angle, size)


def _panned(seed: int, number: int, time: Tensor, u: Tensor, size: int) -> Tensor:
    """A background that moves slowly, [T, 3, S, S]."""
    wide = size + round(_PAN * size)
    whole = backgrounds(seed, np.array([number]), wide)[0]
    direction = 2 * math.pi * u[0]
    travel = (wide - size) / 2
    y, x = (travel * (1 + (2 * time - 1) * f(direction)) for f in (torch.sin, torch.cos))
    return torch.stack(
        [
            whole[:, a : a + size, b : b + size]
            for a, b in zip(y.round().int().tolist(), x.round().int().tolist(), strict=True)
        ]
    )


def write_davis(root: str | Path, videos: int = 8, frames: int = 24, size: int = 192, seed: int = 0) -> Path:
    """Writes videos in DAVIS layout: JPEGImages/480p (the name that readers expect, whatever the size), Annotations, val.txt."""
    root = Path(root)
    check_new_folder("write_davis: the folder", root)
    names = [f"procedural-{number:03d}" for number in range(videos)]
    for number, name in enumerate(names):
        images, labels = draw_video(seed, number, frames, size)
        folders = [root / kind / "480p" / name for kind in ("JPEGImages", "Annotations")]
        for folder in folders:
            folder.mkdir(parents=True)
        for t, (image, label_map) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folders[0] / f"{t:05d}.jpg", quality=95, subsampling=0)
            Image.fromarray(label_map).save(folders[1] / f"{t:05d}.png")
    listed = root / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("\n".join(names) + "\n")
    return root
