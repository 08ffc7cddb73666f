"""Series of ``(step, value)`` points made small enough to draw."""

import math
from collections.abc import Sequence
from typing import TypeVar

Points = Sequence[tuple[int, float]]
T = TypeVar("T")

MAX_POINTS = 600


def columns(points: Points) -> tuple[list[int], list[float]]:
    """Return the steps and the values of the points."""
    return [step for step, _ in points], [value for _, value in points]


def finite(points: Points) -> Points:
    """Return the points whose value is neither NaN nor infinite."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def thin(points: Points, *, limit: int = MAX_POINTS) -> Points:
    """Return at most ``limit`` points that keep the smallest and the largest value of every stretch.

    Example:
        >>> len(thin([(step, step % 7) for step in range(100_000)], limit=100))
        100
    """
    if len(points) <= limit:
        return points
    kept = []
    for part in _stretches(points, limit // 2):
        kept += sorted((min(part, key=_value), max(part, key=_value)))
    return kept


def smooth(points: Points, *, limit: int = 100) -> Points:
    """Return the means of at most ``limit`` stretches, each of eight points or more, at their middle steps.

    Example:
        >>> smooth([(step, float(step % 2)) for step in range(16)])
        [(4, 0.5), (12, 0.5)]
    """
    parts = _stretches(points, max(1, min(limit, len(points) // 8)))
    return [(part[len(part) // 2][0], math.fsum(value for _, value in part) / len(part)) for part in parts if part]


def spaced(items: Sequence[T], *, limit: int) -> list[T]:
    """Return at most ``limit`` of the items, evenly spaced, the first and the last among them.

    Example:
        >>> spaced(range(10), limit=4)
        [0, 3, 6, 9]
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]


def _stretches(points: Points, number: int) -> list[Points]:
    return [points[index * len(points) // number : (index + 1) * len(points) // number] for index in range(number)]


def _value(point: tuple[int, float]) -> float:
    return point[1]
