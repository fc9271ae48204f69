"""Mermaid flowcharts, drawn as SVG when the site is built, so that a page needs no script from a network.

GitHub draws the same text by itself. What is understood: `flowchart TB`, `BT`, `LR` or `RL`, nodes as `name`, `name["text"]` or
`name(text)`, and edges `a --> b` or `a -->|text| b`; <br/> breaks a line. Anything else is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

NODE = r"(\w+)(?:\[\"?(.+?)\"?\]|\(\"?(.+?)\"?\))?"
LINE = re.compile(rf"{NODE}(?:\s*-->\s*(?:\|(.+?)\|\s*)?{NODE})?$")
LETTER, LINE_HEIGHT, MARGIN, GAP = 7.4, 18, 12, 22  # pixels
SWEEPS = 12  # passes in which nodes move towards their neighbors


@dataclass
class Chart:
    direction: str
    labels: dict[str, list[str]] = field(default_factory=dict)
    edges: list[tuple[str, str, str]] = field(default_factory=list)


def parse(text: str) -> Chart:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    head = re.fullmatch(r"flowchart (TB|BT|LR|RL)", lines[0])
    if not head:
        raise ValueError(f"A diagram must begin with flowchart and TB, BT, LR or RL, got {lines[0]!r}")
    chart = Chart(head[1])
    for line in lines[1:]:
        found = LINE.match(line)
        if not found:
            raise ValueError(f"A line of a diagram must be a node or an edge, got {line!r}")
        first, *texts, edge, second = found[1], found[2] or found[3], found[4], found[5]
        for name, label in ((first, texts[0]), (second, found[6] or found[7])):
            if name and (label or name not in chart.labels):
                chart.labels[name] = re.split(r"<br/?>", label or name)
        if second:
            chart.edges.append((first, second, edge or ""))
    return chart


def rank_of(chart: Chart) -> dict[str, int]:
    """How many edges lead to each node at most. No cycles."""
    ranks = dict.fromkeys(chart.labels, 0)
    for _ in ranks:
        for first, second, _ in chart.edges:
            ranks[second] = max(ranks[second], ranks[first] + 1)
    if any(ranks[second] <= ranks[first] for first, second, _ in chart.edges):
        raise ValueError("A diagram must have no cycle, got one")
    return ranks


def lay_out(chart: Chart) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of nodes, and each edge as a path of nodes, one per row; an edge over several rows has a point in each."""
    ranks = rank_of(chart)
    rows: list[list[str]] = [[] for _ in range(max(ranks.values()) + 1)]
    for name, rank in ranks.items():
        rows[rank].append(name)
    paths = []
    for number, (first, second, _) in enumerate(chart.edges):
        points = [f"{number}.{rank}" for rank in range(ranks[first] + 1, ranks[second])]
        for rank, point in enumerate(points, ranks[first] + 1):
            rows[rank].append(point)
        paths.append([first, *points, second])
    near: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for path in paths:
        for one, other in pairwise(path):
            near[one].append(other)
            near[other].append(one)
    for sweep in range(SWEEPS):
        place = {name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
        for row in rows if sweep % 2 else rows[::-1]:
            row.sort(key=lambda name: sum(place[n] for n in near[name]) / max(1, len(near[name])))
            place |= {name: (i + 0.5) / len(row) for i, name in enumerate(row)}
    return rows, paths


def draw(text: str) -> str:
    """The SVG of a diagram; its colors follow the page."""
    chart = parse(text)
    rows, paths = lay_out(chart)
    across = chart.direction in ("LR", "RL")
    size = {name: (3.0, 3.0) for row in rows for name in row}
    for name, label in chart.labels.items():
        size[name] = (max(map(len, label)) * LETTER + 2 * MARGIN, len(label) * LINE_HEIGHT + MARGIN)
    along = lambda name: size[name][1 if across else 0]  # within a row
    deep = lambda name: size[name][0 if across else 1]
    longest = max(sum(map(along, row)) + GAP * (len(row) - 1) for row in rows)
    center, start = {}, 0.0
    for row in rows:
        depth, free = max(map(deep, row)), (longest - sum(map(along, row))) / len(row)
        at = free / 2
        for name in row:
            center[name] = (at + along(name) / 2, start + depth / 2)
            at += along(name) + free
        start += depth + (3 if across else 2) * GAP
    end = start - (3 if across else 2) * GAP
    flip = chart.direction in ("BT", "RL")
    center = {name: (a, end - d if flip else d) for name, (a, d) in center.items()}
    if across:
        center = {name: (d, a) for name, (a, d) in center.items()}
    width, height = (end, longest) if across else (longest, end)
    parts = [
        edge(path, label, center, size, across, flip) for path, (*_, label) in zip(paths, chart.edges, strict=True)
    ]
    parts += [box(*center[name], *size[name], label) for name, label in chart.labels.items()]
    return (
        f'<svg class="diagram" role="img" viewBox="-2 -2 {width + 4:.0f} {height + 4:.0f}" style="max-width: {width + 4:.0f}px">'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z"/></marker></defs>{"".join(parts)}</svg>'
    )


def edge(path: list[str], label: str, center: dict, size: dict, across: bool, flip: bool) -> str:
    """A smooth line through a path's points, from the border of its first box to that of its last."""
    axis, sign = (0 if across else 1), (-1 if flip else 1)
    points = [list(center[name]) for name in path]
    points[0][axis] += sign * size[path[0]][axis] / 2
    points[-1][axis] -= sign * size[path[-1]][axis] / 2
    line = "M{:.1f} {:.1f}".format(*points[0])
    for one, other in pairwise(points):
        middle = (one[axis] + other[axis]) / 2
        bends = [[middle, p[1]] if across else [p[0], middle] for p in (one, other)]
        line += " C" + ", ".join("{:.1f} {:.1f}".format(*p) for p in (*bends, other))
    text = ""
    if label:
        x, y = ((a + b) / 2 for a, b in zip(points[0], points[1], strict=True))
        text = f'<text class="edge" x="{x:.0f}" y="{y - 4:.0f}">{escape(label)}</text>'
    return f'<path class="edge" d="{line}" marker-end="url(#arrow)"/>{text}'


def box(x: float, y: float, width: float, height: float, label: list[str]) -> str:
    top = y - (len(label) - 1) * LINE_HEIGHT / 2 + 4
    lines = [f'<text x="{x:.0f}" y="{top + i * LINE_HEIGHT:.0f}">{escape(text)}</text>' for i, text in enumerate(label)]
    frame = f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6"/>'
    return frame + "".join(lines)


class Mermaid(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            picture = draw("\n".join(self.content))
        except ValueError as error:
            raise self.error(str(error)) from error
        return [nodes.raw("", picture, format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("mermaid", Mermaid)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
