"""Make the points of a curve fewer or smoother, with gaps where there is no value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

Point = tuple[float, float | None]
"""Where on the horizontal axis, and the value there; None leaves a gap."""

# Points of one curve that are drawn as they are. More are drawn as the lowest and the highest of each of half as many
# stretches: nobody sees more on a screen, and a page of a long run stays small.
MOST_POINTS = 600


@dataclass(frozen=True)
class Series:
    """Holds one curve."""

    name: str
    points: Sequence[Point]
    faint: bool = False
    """Whether it is drawn behind the others, as what a smoothed curve was made from."""
    dots: bool = False
    """Whether its points are marked, because there are few and each was measured by itself."""
    colour: int | None = None
    """Number of its colour; default: its place among the curves of a chart."""


def present(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Returns the points that have a value."""
    return [(x, y) for x, y in points if y is not None]


def stretches(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Returns the points between gaps, stretch by stretch."""
    return [present(list(group)) for there, group in groupby(points, key=lambda point: point[1] is not None) if there]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Returns at most ``most`` points: of each stretch of steps the lowest and the highest, in their order.

    No peak is lost by it. A stretch without any value leaves a gap.
    """
    if len(points) <= most:
        return list(points)
    result: list[Point] = []
    count = max(1, most // 2)
    bounds = [number * len(points) // count for number in range(count + 1)]
    for start, end in pairwise(bounds):
        there = [(y, index) for index in range(start, end) if (y := points[index][1]) is not None]
        if there:
            result += [points[index] for index in sorted({min(there)[1], max(there)[1]})]
        else:
            result.append((points[start][0], None))
    return result


def smoothed(points: Sequence[Point], weights: Sequence[float], window: int) -> list[Point]:
    """Returns at each point the weighted mean of the ``window`` points around it.

    At the beginning, where a loss falls fast, there are as few after a point as before it; at the end only fewer after.
    A gap stays one, and its neighbours are means of what there is. Points are returned as they are where one is so
    large that running sums would lose the others beside it.
    """
    sizes = sorted(abs(y) for _, y in present(points))
    if not sizes or sizes[-1] > 1e6 * max(sizes[len(sizes) // 2], 1e-6):
        return list(points)
    values, counts = [0.0], [0.0]
    for (_, y), weight in zip(points, weights, strict=True):
        values.append(values[-1] + (y * weight if y is not None else 0.0))
        counts.append(counts[-1] + (weight if y is not None else 0.0))
    result: list[Point] = []
    for index, (x, y) in enumerate(points):
        half = min(window // 2, index)
        start, end = index - half, min(index + half + 1, len(points))
        weight = counts[end] - counts[start]
        mean = (values[end] - values[start]) / weight if weight > 0 else None
        result.append((x, mean if y is not None and mean is not None and math.isfinite(mean) else None))
    return result


def smoothing_window(count: int) -> int:
    """Returns how many steps a mean is taken over: a twentieth of all, an odd number; 1 for a run of few steps."""
    return 1 if count < 12 else max(5, count // 20) // 2 * 2 + 1
