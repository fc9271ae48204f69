"""A number over the steps of a run, in a bounded number of points however long the run is."""

from __future__ import annotations

import math
from collections.abc import Iterable

MOST_POINTS = 400  # an even number


class Point:
    """Some lines that follow each other, together: mean, lowest and highest of their finite values, if there is any."""

    __slots__ = ("finite", "high", "lines", "low", "steps", "total")

    def __init__(self) -> None:
        self.lines = self.finite = 0
        self.steps = self.total = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, step: float, value: float | None) -> None:
        """Adds a line."""
        self.lines += 1
        self.steps += step
        if value is not None:
            self.finite += 1
            self.total += value
            if value < self.low:
                self.low = value
            if value > self.high:
                self.high = value

    def merge(self, other: Point) -> None:
        """Takes the lines of the point that follows."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.lines += other.lines
        self.steps += other.steps
        self.finite += other.finite
        self.total += other.total

    @property
    def step(self) -> float:
        return self.steps / self.lines

    @property
    def mean(self) -> float:
        """Of the finite values."""
        return self.total / self.finite


class Series:
    """Values in at most MOST_POINTS points. When there are more, neighbors are merged, and later points have as many lines."""

    def __init__(self, values: Iterable[tuple[float, float | None]] = ()) -> None:
        """values: pairs of a step and a value, None where there is no finite one."""
        self.points: list[Point] = []
        self.lines_per_point = 1
        self.last: tuple[float, float] | None = None  # step and value of the last finite value
        self.highest: tuple[float, float] | None = None  # and of the highest
        self.total = 0.0
        for step, value in values:
            self.add(step, value)

    def add(self, step: float, value: float | None) -> None:
        """Adds the value of a line."""
        if value is not None:
            self.last = (step, value)
            self.total += value
            if self.highest is None or value > self.highest[1]:
                self.highest = (step, value)
        if self.points and self.points[-1].lines < self.lines_per_point:
            self.points[-1].add(step, value)
            return
        if len(self.points) == MOST_POINTS:
            self._halve()
        self.points.append(Point())
        self.points[-1].add(step, value)

    def median(self) -> float | None:
        """Of the points' means."""
        means = sorted(point.mean for point in self.points if point.finite)
        return means[len(means) // 2] if means else None

    def _halve(self) -> None:
        for first, second in zip(self.points[::2], self.points[1::2], strict=True):
            first.merge(second)
        self.points = self.points[::2]
        self.lines_per_point *= 2
