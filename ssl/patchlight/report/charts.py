"""Line charts as inline SVG: nothing to load, colors from the page's style sheet, values on hover."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 28  # margins around the plotting area
MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Series:
    """A line: values over steps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def line_chart(
    series: Sequence[Series],
    total: float | None = None,
    write: Callable[[float], str] | None = None,
    reference: tuple[float, str] | None = None,
    from_zero: bool = False,
    dots: bool = False,
) -> str:
    """Lines over steps 0..total, as an <svg>. `write` makes a value text; reference is a level with a name."""
    series = [thinned(line) for line in series if line.steps]
    write = write or short
    if not series:
        return '<p class="nothing">no values yet</p>'
    ticks = _value_ticks([v for line in series for v in line.values], reference, from_zero)
    low, high = ticks[0], ticks[-1]
    last = max(total or 0, max(line.steps[-1] for line in series), 1)

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - min(value, high)) / (high - low), 1)

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
    for number, line in enumerate(series):
        points = [(x(step), y(value)) for step, value in zip(line.steps, line.values, strict=True)]
        if len(points) > 1:
            parts.append(f'<polyline class="line c{number}" points="{" ".join(f"{a},{b}" for a, b in points)}"/>')
        marked = points if dots or len(points) == 1 else points[-1:]
        parts += [f'<circle class="dot c{number}" cx="{a}" cy="{b}" r="3.2"/>' for a, b in marked]
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    hover = [
        {
            "name": line.name,
            "x": [x(step) for step in line.steps],
            "y": [y(value) for value in line.values],
            "text": [write(value) for value in line.values],
            "steps": [round(step) for step in line.steps],
        }
        for line in series
    ]
    data = escape(json.dumps(hover, separators=(",", ":")), quote=True)
    label = escape(", ".join(f"{line.name}: last {write(line.values[-1])}" for line in series), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" data-hover="{data}">'
        f"{''.join(parts)}</svg>"
    )


def legend(series: Sequence[Series]) -> str:
    """Names beside their colors; nothing for a single line, whose chart's title names it."""
    if len(series) < 2:
        return ""
    keys = (f'<span class="key"><i class="c{i}"></i>{escape(line.name)}</span>' for i, line in enumerate(series))
    return f'<div class="legend">{"".join(keys)}</div>'


def thinned(series: Series) -> Series:
    """At most MOST_POINTS points, each the mean of its neighbors; the last value stays exact."""
    count = len(series.steps)
    if count <= MOST_POINTS:
        return series
    edges = [round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]

    def means(values: Sequence[float]) -> list[float]:
        parts = [values[a:b] for a, b in pairwise(edges)]
        return [sum(part) / len(part) for part in parts] + [values[-1]]

    return Series(series.name, means(series.steps), means(series.values))


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose [low, high], about `count` steps apart."""
    if high <= low:
        low, high = low - 0.1 * abs(low), high + (0.1 * abs(high) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _value_ticks(values: list[float], reference: tuple[float, str] | None, from_zero: bool) -> list[float]:
    """Ticks around the values, without the few highest ones of a long curve, which would flatten the rest."""
    ordered = sorted(values)
    high = ordered[-1] if len(ordered) < 50 else max(ordered[int(0.99 * len(ordered))], values[-1])
    levels = [ordered[0], high] + ([reference[0]] if reference else []) + ([0.0] if from_zero else [])
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
