"""Lay values out along an axis: its bounds, its round ticks, and where between 0 and 1 a value stands."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# What is larger, or nearer to zero and not zero, can be no figure of a run, and would be too much for the sums below.
LARGEST, SMALLEST = 1e100, 1e-100
# A positive quantity whose largest value is so many times its median is drawn on a logarithmic axis.
SPREAD = 30


@dataclass(frozen=True)
class Axis:
    """Spans the values from ``low`` to ``high``, evenly or by their logarithm."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Returns the place of ``value``: 0 at ``low``, 1 at ``high``."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, value))
        return (value - low) / (high - low)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, most: int = 5) -> list[float]:
        """Returns at most ``most`` round values in the span, and at least two."""
        return _powers(self.low, self.high, most) if self.log else _round_values(self.low, self.high, most)


def drawable(value: float) -> bool:
    """Says whether a value can stand on an axis."""
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


def axis_of(values: Iterable[float], zero: bool = False) -> Axis:
    """Returns an axis that holds all ``values``, with some room above and below.

    zero: whether it begins at zero, for quantities whose length is compared. Values of very different size get a
    logarithmic axis, unless one of them is not positive.
    """
    ordered = sorted(values) or [0.0, 1.0]
    low, high, middle = ordered[0], ordered[-1], ordered[len(ordered) // 2]
    if low > 0 and high / SPREAD > middle:
        return Axis(low / 1.2, high * 1.2, log=True)
    if zero:
        low = min(low, 0.0)
    # Values that are almost one would leave an axis without length.
    least = max(abs(low), abs(high)) * 1e-6 or 1.0
    if high - low < least:
        low, high = (low, high + least) if zero and low == 0 else (low - least, high + least)
    room = (high - low) * 0.06
    return Axis(low if low == 0 else max(low - room, 0.0) if low > 0 else low - room, high + room)


def step_axis(steps: Iterable[float]) -> Axis:
    """Returns an axis from the first to the last step, without room beside them."""
    found = list(steps) or [0.0, 1.0]
    low, high = min(found), max(found)
    return Axis(low, high) if high > low else Axis(low - 0.5, high + 0.5)


def _round_values(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    found = [round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)]
    return found if len(found) > 1 else [low, high]


def _powers(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    found = [10.0**power for power in range(first, last + 1, 1 + (last - first) // most)]
    return found if len(found) > 1 else [low, *found, high]
