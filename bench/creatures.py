"""Scenes for a study of dense features: objects of ten classes that are built of parts, over textured ground, partly hidden.

What a patch shows is told by its texture and by what lies around it, never by its color: colors, brightness and shading have one
distribution for all parts, objects and grounds. The kind of a part occurs in several classes, and single parts lie about, so a
class is the layout of its parts. Image i is a pure function of (seed, i, size).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patchlight.data.random_numbers import PROCEDURAL, random_uniform

KINDS = ("stripes", "scales", "rings", "panes", "chevrons", "rays", "spots", "plain")  # of parts, by their texture
SHAPES = ("ellipse", "box", "triangle")


@dataclass(frozen=True)
class Part:
    """A part in its object's coordinates, which reach from -1 to 1."""

    kind: str
    shape: str
    x: float
    y: float
    half_width: float
    half_height: float
    angle: float = 0.0  # in half turns
    swing: float = 0.0  # how far it turns at most, in half turns


CLASSES: dict[str, tuple[Part, ...]] = {  # drawn in this order, so that later parts cover earlier ones
    "fish": (
        Part("chevrons", "triangle", -0.78, 0.0, 0.3, 0.45, 0.0, 0.08),
        Part("stripes", "triangle", 0.0, -0.5, 0.25, 0.25, -0.5, 0.06),
        Part("scales", "ellipse", 0.1, 0.0, 0.72, 0.42),
        Part("plain", "ellipse", 0.55, -0.1, 0.13, 0.13),
    ),
    "bird": (
        Part("panes", "triangle", 0.86, -0.42, 0.2, 0.13),
        Part("stripes", "ellipse", -0.05, 0.15, 0.62, 0.42),
        Part("plain", "ellipse", 0.55, -0.42, 0.27, 0.27),
        Part("chevrons", "ellipse", -0.2, 0.05, 0.5, 0.25, -0.12, 0.15),
    ),
    "cart": (
        Part("panes", "box", 0.0, -0.15, 0.85, 0.35),
        Part("stripes", "box", -0.35, -0.65, 0.4, 0.2),
        Part("rings", "ellipse", -0.5, 0.4, 0.32, 0.32),
        Part("rings", "ellipse", 0.5, 0.4, 0.32, 0.32),
    ),
    "beetle": (
        Part("plain", "box", -0.4, 0.0, 0.1, 0.85, 0.06, 0.1),
        Part("plain", "box", 0.1, 0.0, 0.1, 0.85, -0.06, 0.1),
        Part("spots", "ellipse", 0.72, 0.0, 0.26, 0.3),
        Part("rays", "ellipse", -0.1, 0.0, 0.7, 0.52),
    ),
    "snail": (
        Part("plain", "box", 0.1, 0.55, 0.85, 0.17),
        Part("stripes", "ellipse", 0.78, 0.2, 0.2, 0.36, 0.08, 0.08),
        Part("rings", "ellipse", -0.1, -0.05, 0.58, 0.58),
    ),
    "house": (
        Part("panes", "box", 0.0, 0.3, 0.65, 0.55),
        Part("scales", "triangle", 0.0, -0.55, 0.4, 0.85, -0.5),
        Part("stripes", "box", 0.2, 0.5, 0.18, 0.35),
    ),
    "tree": (
        Part("stripes", "box", 0.0, 0.58, 0.16, 0.42),
        Part("spots", "ellipse", -0.35, -0.1, 0.5, 0.42),
        Part("spots", "ellipse", 0.35, -0.15, 0.5, 0.42),
        Part("chevrons", "ellipse", 0.0, -0.5, 0.48, 0.42),
    ),
    "turtle": (
        Part("plain", "ellipse", 0.8, 0.05, 0.26, 0.2, 0.0, 0.08),
        Part("stripes", "box", -0.5, 0.42, 0.14, 0.36, 0.08, 0.12),
        Part("stripes", "box", 0.45, 0.42, 0.14, 0.36, -0.08, 0.12),
        Part("scales", "ellipse", 0.0, -0.1, 0.7, 0.5),
    ),
    "plane": (
        Part("panes", "box", 0.0, 0.0, 0.2, 0.92, 0.06, 0.04),
        Part("plain", "ellipse", 0.0, 0.0, 0.92, 0.24),
        Part("chevrons", "triangle", -0.72, -0.3, 0.3, 0.25, 0.4, 0.04),
        Part("rings", "ellipse", 0.4, 0.0, 0.18, 0.18),
    ),
    "flower": (
        Part("stripes", "box", 0.0, 0.62, 0.1, 0.4),
        Part("rays", "ellipse", -0.42, -0.25, 0.42, 0.3, 0.1, 0.06),
        Part("rays", "ellipse", 0.42, -0.25, 0.42, 0.3, -0.1, 0.06),
        Part("rays", "ellipse", 0.0, -0.68, 0.28, 0.34, 0.0, 0.06),
        Part("spots", "ellipse", 0.0, -0.25, 0.26, 0.26),
    ),
}
PARTS = max(map(len, CLASSES.values()))
OBJECTS = 4  # one that names the image's class, two smaller ones of other classes, and a loose part
FIELDS = 8 + 9 * PARTS  # random numbers of an object: place, size, angle, side; of each part: swing, colors, phase
_NOISE = (3, 8, 24)  # cells per side of the ground's noises
_CHUNK = 32


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes and what is in them."""

    images: np.ndarray  # [B, S, S, 3] uint8
    labels: np.ndarray  # [B] int64, the class of the largest object
    objects: np.ndarray  # [B, S, S] uint8: 0 the ground, else 1 + the number of an object
    classes: np.ndarray  # [B, S, S] uint8: 0 the ground and loose parts, else 1 + class
    parts: np.ndarray  # [B, S, S] uint8: 0 the ground, else 1 + kind


@dataclass(frozen=True)
class Placed:
    """Where the objects of B scenes are: one entry per scene."""

    classes: Tensor  # [B] int64
    x: Tensor  # [B] in image widths
    y: Tensor
    half_size: Tensor
    angle: Tensor  # radians
    mirrored: Tensor  # [B] bool
    only: Tensor  # [B] int64: the one part that is there, or -1 for all
    u: Tensor  # [B, 9 * PARTS] numbers of the parts
    time: Tensor  # [B] moves the parts


def _table(name: str) -> Tensor:
    """A number of every part, [classes, PARTS]; absent parts have kind -1."""
    absent = {"kind": -1, "shape": -1}.get(name, 0.0)
    names = {"kind": KINDS, "shape": SHAPES}.get(name)
    value = lambda part: names.index(getattr(part, name)) if names else getattr(part, name)
    rows = [[value(p) for p in parts] + [absent] * (PARTS - len(parts)) for parts in CLASSES.values()]
    return torch.tensor(rows)


TABLES = {name: _table(name) for name in ("kind", "shape", "x", "y", "half_width", "half_height", "angle", "swing")}


def draw(seed: int, indices: np.ndarray, size: int) -> Scenes:
    """The scenes of these numbers."""
    chunks = [_draw(seed, indices[first : first + _CHUNK], size) for first in range(0, len(indices), _CHUNK)]
    fields = ("images", "labels", "objects", "classes", "parts")
    return Scenes(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in fields))


def _draw(seed: int, indices: np.ndarray, size: int) -> Scenes:
    u = uniform(seed, 11, indices, OBJECTS * FIELDS + 16)
    objects, scene = u[:, :-16].unflatten(1, (OBJECTS, FIELDS)), u[:, -16:]
    labels = (scene[:, 0] * len(CLASSES)).long()
    canvas = Canvas(grounds(seed, indices, size))
    front = (scene[:, 1] * 3).long()  # how many others the main object covers
    for layer in range(OBJECTS):
        # Layer `front` is the main object; the others keep their order.
        number = torch.where(layer < front, layer + 1, torch.full_like(front, layer)) * (layer != front)
        mine = objects[torch.arange(len(u)), number]
        canvas.add(_placed(labels, number, mine, scene), number)
    return canvas.scenes(labels, scene[:, 8:])


def _placed(labels: Tensor, number: Tensor, u: Tensor, scene: Tensor) -> Placed:
    main, loose = number == 0, number == OBJECTS - 1
    others = (labels + 1 + (u[:, 0] * (len(CLASSES) - 1)).long()) % len(CLASSES)
    direction = 2 * math.pi * (scene[:, 2] + number / (OBJECTS - 1) + 0.1 * u[:, 1])
    distance = torch.where(main, 0.1 * u[:, 2], 0.36 + 0.1 * u[:, 2])
    sizes = torch.where(main, 0.32 + 0.08 * u[:, 3], torch.where(loose, 0.26 + 0.08 * u[:, 3], 0.18 + 0.06 * u[:, 3]))
    classes = torch.where(main, labels, others)
    count = (TABLES["kind"] >= 0).sum(1)[classes]
    only = torch.where(loose, (u[:, 4] * count).long(), -1)
    return Placed(
        classes, 0.5 + distance * torch.cos(direction), 0.5 + distance * torch.sin(direction), sizes,
        (2 * u[:, 5] - 1) * math.pi / 7, u[:, 6] < 0.5, only, u[:, 8:], torch.zeros(len(u)),
    )  # fmt: skip


def draw_video(seed: int, number: int, frames: int, size: int) -> Scenes:
    """A video: three objects of different classes cross each other's ways, turn, change size and move their parts."""
    u = uniform(seed, 13, np.array([number]), OBJECTS * FIELDS + 16)
    objects, scene = u[0, :-16].unflatten(0, (OBJECTS, FIELDS)), u[:, -16:]
    time = torch.linspace(0, (frames - 1) / 23, frames)  # the same speed, however long the video is
    canvas = Canvas(grounds(seed, np.array([number]), size).expand(frames, -1, -1, -1).clone())
    chosen = torch.argsort(uniform(seed, 14, np.array([number]), len(CLASSES))[0])
    for k in range(OBJECTS - 1):
        place = 2 * math.pi * (k / (OBJECTS - 1) + float(scene[0, 2]))
        canvas.add(_moving(int(chosen[k]), objects[k], place, time), torch.full((frames,), k))
    light = scene[:, 8:].expand(frames, -1)
    return canvas.scenes(torch.full((frames,), int(chosen[0])), light)


def _moving(number: int, u: Tensor, place: float, time: Tensor) -> Placed:
    """An object in every frame: it goes through the middle to the other side."""
    frames, across = len(time), torch.cos(math.pi * (0.25 * u[1] + (0.7 + 0.3 * u[2]) * time))
    aside = 0.1 + 0.1 * u[3]
    x = 0.5 + 0.3 * across * math.cos(place) - aside * math.sin(place)
    y = 0.5 + 0.3 * across * math.sin(place) + aside * math.cos(place)
    size = (0.2 + 0.06 * u[4]) * (1 + 0.15 * torch.sin(2 * math.pi * (u[5] + 0.7 * time)))
    angle = (2 * u[6] - 1) * math.pi / 7 + (2 * u[7] - 1) * math.pi / 3 * time
    wide = lambda value: torch.full((frames,), value)
    parts = u[8:].expand(frames, -1)
    return Placed(wide(number), x, y, size, angle, wide(bool(u[0] < 0.5)), wide(-1), parts, u[0] + 1.5 * time)


class Canvas:
    """Images that objects are drawn on, one per image at a time, and maps of what is where."""

    def __init__(self, ground: Tensor) -> None:
        self.image = ground
        self.maps = torch.zeros(3, len(ground), *ground.shape[2:], dtype=torch.uint8)  # objects, classes, parts

    def add(self, placed: Placed, number: Tensor) -> None:
        """Draws an object into every image. number: [B] of the objects, for the map of objects."""
        size = self.image.shape[-1]
        line = (torch.arange(size) + 0.5) / size
        dx, dy = line[None, None, :] - _wide(placed.x), line[None, :, None] - _wide(placed.y)
        cos, sin = _wide(torch.cos(placed.angle)), _wide(torch.sin(placed.angle))
        x = (dx * cos + dy * sin) / _wide(placed.half_size) * _wide(1.0 - 2.0 * placed.mirrored)
        y = (dy * cos - dx * sin) / _wide(placed.half_size)
        for part in range(PARTS):
            kind = TABLES["kind"][placed.classes, part]
            there = (kind >= 0) & ((placed.only < 0) | (placed.only == part))
            rows = there.nonzero()[:, 0]
            if len(rows):
                self._add_part(placed, number, part, rows, x[rows], y[rows])

    def _add_part(self, placed: Placed, number: Tensor, part: int, rows: Tensor, x: Tensor, y: Tensor) -> None:
        values = {name: table[placed.classes[rows], part] for name, table in TABLES.items()}
        u = placed.u[rows].unflatten(1, (PARTS, 9))[:, part]
        swing = (2 * u[:, 0] - 1) * values["swing"] + values["swing"] * torch.sin(2 * math.pi * placed.time[rows])
        angle = math.pi * (values["angle"] + swing)
        cos, sin = _wide(torch.cos(angle)), _wide(torch.sin(angle))
        dx, dy = x - _wide(values["x"]), y - _wide(values["y"])
        right, down = dx * cos + dy * sin, dy * cos - dx * sin
        a, b = _wide(values["half_width"]), _wide(values["half_height"])
        distance = torch.empty_like(right)
        for shape in values["shape"].unique().tolist():
            chosen = (values["shape"] == shape).nonzero()[:, 0]
            distance[chosen] = _outline(SHAPES[shape], right[chosen], down[chosen], a[chosen], b[chosen])
        ink = torch.empty_like(right)
        for kind in values["kind"].unique().tolist():
            chosen = (values["kind"] == kind).nonzero()[:, 0]
            ink[chosen] = _texture(KINDS[kind], right[chosen], down[chosen], u[chosen, 7])
        pixels = distance * _wide(placed.half_size[rows]) * self.image.shape[-1]
        cover = (0.5 - pixels).clamp_(0, 1)[:, None]
        fill, other = tones(u[:, 1:7])
        shade = 1 + 0.25 * (u[:, 8, None, None] - 0.5) * (right / a + down / b)
        color = (fill + (other - fill) * ink[:, None]) * shade[:, None]
        self.image[rows] += (color - self.image[rows]) * cover
        inside = pixels < 0
        loose = placed.only[rows] >= 0
        marks = number[rows] + 1, torch.where(loose, 0, placed.classes[rows] + 1), values["kind"] + 1
        for level, mark in enumerate(marks):
            self.maps[level, rows] = torch.where(inside, _wide(mark).to(torch.uint8), self.maps[level, rows])

    def scenes(self, labels: Tensor, u: Tensor) -> Scenes:
        """Light falls from one side, contrast and noise differ between images; then everything as arrays."""
        size = self.image.shape[-1]
        line = torch.linspace(-1, 1, size)
        light = _wide(torch.cos(2 * math.pi * u[:, 0])) * line[None, None, :]
        light = light + _wide(torch.sin(2 * math.pi * u[:, 0])) * line[None, :, None]
        gain = 1 + 0.3 * _wide(u[:, 1]) * light
        image = self.image * gain[:, None]
        contrast = _wide(0.7 + 0.6 * u[:, 2])[:, None]
        image = 0.5 + (image - 0.5) * contrast + _wide(0.2 * (u[:, 3] - 0.5))[:, None]
        pixels = (image.clamp_(0, 1) * 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        objects, classes, parts = self.maps.numpy()
        return Scenes(pixels, labels.numpy(), objects, classes, parts)


def uniform(seed: int, purpose: int, indices: np.ndarray, fields: int) -> Tensor:
    return torch.from_numpy(random_uniform(seed, PROCEDURAL, purpose, indices[:, None], np.arange(fields))).float()


def grounds(seed: int, indices: np.ndarray, size: int) -> Tensor:
    """Noise of three scales in two tones, [B, 3, size, size]; how strong each scale is differs between images."""
    counts = [side * side for side in _NOISE]
    u = uniform(seed, 12, indices, sum(counts) + 9)
    field = torch.zeros(len(indices), 1, size, size)
    for level, (side, part) in enumerate(zip(_NOISE, u[:, 9:].split(counts, 1), strict=True)):
        noise = F.interpolate(part.view(-1, 1, side, side) - 0.5, size=(size, size), mode="bicubic")
        field += (0.3 + u[:, 6 + level, None, None, None]) * noise
    fill, other = tones(u[:, :6])
    return fill + (other - fill) * (0.5 + field).clamp_(0, 1)


def tones(u: Tensor) -> tuple[Tensor, Tensor]:
    """Two colors of any hue that differ in brightness, either one the brighter, from u [B, 6]: [B, 3, 1, 1] each."""
    hue, delta = 0.25 + 0.5 * u[:, :3], 0.15 + 0.2 * u[:, 3:4]
    sign = torch.where(u[:, 4:5] < 0.5, -1.0, 1.0)
    tint = 0.2 * (u[:, 5:6] - 0.5)
    return (hue + sign * delta)[..., None, None], (hue - sign * delta + tint)[..., None, None]


def _wide(x: Tensor) -> Tensor:
    return x[:, None, None]


def _outline(shape: str, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Signed distance to an outline, nearly, in the object's units; negative inside."""
    if shape == "ellipse":
        return (torch.hypot(x / a, y / b) - 1) * torch.minimum(a, b)
    if shape == "box":
        return torch.maximum(x.abs() - a, y.abs() - b)
    return torch.maximum(
        -x - a, (y.abs() - b * (a - x) / (2 * a)) * (2 * a) / torch.hypot(b, 2 * a)
    )  # its tip is at x = a


def _texture(kind: str, x: Tensor, y: Tensor, phase: Tensor) -> Tensor:
    """How much ink covers a place, 0 to 1, in the object's units."""
    turn = 2 * math.pi * _wide(phase)
    soft = lambda wave: torch.sigmoid(6 * wave)
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    match kind:
        case "stripes":
            return soft(torch.sin(26 * x + turn))
        case "scales":
            return soft(torch.cos(20 * x + turn) * torch.cos(20 * y) + 0.1)
        case "rings":
            return soft(torch.cos(30 * radius + turn))
        case "panes":
            return soft(torch.maximum(torch.cos(17 * x + turn), torch.cos(17 * y)) - 0.8)
        case "chevrons":
            return soft(torch.sin(24 * (x + y.abs()) + turn))
        case "rays":
            return soft(torch.sin(10 * angle + turn))
        case "spots":
            return soft(torch.cos(15 * x + turn) + torch.cos(15 * y + turn) - 1.0)
    return torch.full_like(x, 0.5)


def draw_sheet(out: Path = Path("bench/results/study/creatures.png"), size: int = 96, columns: int = 10) -> None:
    """Draw a sheet of the scenes and of a video, each row above its classes and its parts.

    Args:
        out: the PNG to write.
        size: side of an image.
        columns: images in a row.
    """
    rows = []
    scenes, video = draw(0, np.arange(2 * columns), size), draw_video(0, 0, 24, size)
    for shown in (slice(0, columns), slice(columns, 2 * columns)):
        rows += [scenes.images[shown], _colored(scenes.classes[shown]), _colored(scenes.parts[shown])]
    frames = np.linspace(0, 23, columns).round().astype(int)
    rows += [video.images[frames], _colored(video.objects[frames])]
    Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows])).save(out)
    print(f"sheet: {out}")


def _colored(maps: np.ndarray) -> np.ndarray:
    """A color for each value, black for 0."""
    palette = np.random.default_rng(3).integers(40, 255, (max(len(CLASSES), len(KINDS)) + 1, 3)).astype(np.uint8)
    palette[0] = 0
    return palette[maps]
