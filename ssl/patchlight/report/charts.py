"""Line charts as inline SVG: nothing to load, colors from the page's style sheet, values on hover."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from .series import Point, Series

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 28  # margins around the plotting area


@dataclass(frozen=True, slots=True)
class Plane:
    """The plotting area: steps 0..last and values low..high."""

    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / self.last, 1)

    def y(self, value: float) -> float:
        share = (self.high - max(self.low, min(value, self.high))) / (self.high - self.low)
        return round(TOP + (HEIGHT - TOP - BOTTOM) * share, 1)


def line_chart(
    series: Mapping[str, Series],
    total: float | None = None,
    write: Callable[[float], str] | None = None,
    reference: tuple[float, str] | None = None,
    from_zero: bool = False,
    dots: bool = False,
) -> str:
    """Lines by name over steps 0..total, as an <svg>. Where a point stands for several values, a band shows their range.

    `write` makes a value text; reference is a level with a name.
    """
    series = {name: line for name, line in series.items() if line.last}
    write = write or short
    if not series:
        return '<p class="nothing">no values yet</p>'
    ticks = _value_ticks(series.values(), reference, from_zero)
    ends = [line.last[0] for line in series.values() if line.last]
    last = max(total or 0, 1, *ends, *(point.step for line in series.values() for point in line.points))
    plane = Plane(last, ticks[0], ticks[-1])
    x, y = plane.x, plane.y
    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t)}" y2="{y(t)}"/>' for t in ticks]
    parts += [f'<text class="tick" x="{LEFT - 7}" y="{y(t) + 3.5}" text-anchor="end">{write(t)}</text>' for t in ticks]
    step_ticks = [t for t in nice_ticks(0, last, 4) if t <= last]
    parts += [
        f'<text class="tick" x="{x(t)}" y="{HEIGHT - 8}" text-anchor="middle">{short(t)}</text>' for t in step_ticks
    ]
    if reference:
        level, name = reference
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level)}" y2="{y(level)}"/>')
        parts.append(f'<text class="tick" x="{LEFT + 4}" y="{y(level) - 4}">{escape(name)}</text>')
    for number, line in enumerate(series.values()):
        parts += _line(line, number, plane, dots)
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    label = ", ".join(f"{name}: last {write(line.last[1])}" for name, line in series.items() if line.last)
    hover = [_hover(name, line.points, plane, write) for name, line in series.items()]
    data = escape(json.dumps(hover, separators=(",", ":")), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}" '
        f'data-hover="{data}">{"".join(parts)}</svg>'
    )


def _line(line: Series, number: int, plane: Plane, dots: bool) -> list[str]:
    """A line that is interrupted where there are no finite values, its band, and dots: the last value, and lonely ones."""
    parts, marked = [], [line.last] if line.last else []
    for finite, run in groupby(line.points, key=lambda point: point.finite > 0):
        if not finite:
            continue
        points = list(run)
        means = [(point.step, point.mean) for point in points]
        if line.lines_per_point > 1:
            edges = [(point.step, point.high) for point in points]
            edges += [(point.step, point.low) for point in reversed(points)]
            parts.append(f'<polygon class="band c{number}" points="{_pairs(edges, plane)}"/>')
        if len(points) > 1:
            parts.append(f'<polyline class="line c{number}" points="{_pairs(means, plane)}"/>')
        marked += means if dots or len(points) == 1 else []
    return parts + [
        f'<circle class="dot c{number}" cx="{plane.x(step)}" cy="{plane.y(value)}" r="3.2"/>'
        for step, value in dict.fromkeys(marked)
    ]


def _pairs(points: Sequence[tuple[float, float]], plane: Plane) -> str:
    return " ".join(f"{plane.x(step)},{plane.y(value)}" for step, value in points)


def _hover(name: str, points: Sequence[Point], plane: Plane, write: Callable[[float], str]) -> dict:
    """What the page's script shows beside the pointer."""

    def text(point: Point) -> str:
        if not point.finite:
            return "not finite"
        spread = "" if point.low == point.high else f" ({write(point.low)} to {write(point.high)})"
        return write(point.mean) + spread

    return {
        "name": name,
        "x": [plane.x(point.step) for point in points],
        "text": [text(point) for point in points],
        "steps": [round(point.step) for point in points],
    }


def legend(names: Collection[str]) -> str:
    """Names beside their colors; nothing for a single line, whose chart's title names it."""
    if len(names) < 2:
        return ""
    keys = (f'<span class="key"><i class="c{i}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{"".join(keys)}</div>'


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose [low, high], about `count` steps apart."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.1 * abs(low), high + (0.1 * abs(high) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _value_ticks(series: Collection[Series], reference: tuple[float, str] | None, from_zero: bool) -> list[float]:
    """Ticks around the means, without the few highest ones of a long curve, which would flatten the rest."""
    ordered = sorted(point.mean for line in series for point in line.points if point.finite)
    latest = [line.last[1] for line in series if line.last]
    high = ordered[-1] if len(ordered) < 50 else ordered[int(0.99 * len(ordered))]
    levels = [*latest, ordered[0], high] + ([reference[0]] if reference else []) + ([0.0] if from_zero else [])
    return nice_ticks(min(levels), max(levels))


def short(value: float) -> str:
    """A number as a short text: 12 000 as 12k, small numbers with three digits."""
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.3g}G"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100 or value == round(value):
        return f"{value:.0f}"
    if size >= 1e-4:
        return f"{value:.4g}" if size >= 1 else f"{value:.3g}"
    return f"{value:.1e}"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"
