"""Define ranges of numbers that stand beside their type: ``r: Annotated[int, Range(1, 4096)]``.

Every number of the configuration and of the command line has one, so that a senseless value is refused before anything
is loaded.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Holds the numbers from ``low`` to ``high``. ``above`` excludes ``low`` itself, ``below`` excludes ``high``."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def fault(self, value: float) -> str:
        """Returns what is wrong with ``value`` ("must be positive, got 0"), or an empty text if it is in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number, got {value}"
        shown = f"got {value}" if isinstance(value, float) or value.bit_length() < 200 else "got far more"
        if value < self.low or (self.above and value == self.low):
            return f"must {self._at_least(value)}, {shown}"
        if value > self.high or (self.below and value == self.high):
            return f"must be {'less than' if self.below else 'at most'} {self.high:,}, {shown}"
        return ""

    def _at_least(self, value: float) -> str:
        if self.low == 0 and not self.above:
            return "not be negative"
        if value <= 0 and (self.low < 1 or (self.low == 1 and not self.above)):
            return "be positive"
        return f"be {'larger than' if self.above else 'at least'} {self.low:,}"


Count = Annotated[int, Range(1, 10**9)]
"""Counts at least one thing; more than a billion is a slip of the keyboard."""
CountOrNone = Annotated[int, Range(0, 10**9)]
"""Counts things; zero stands for none."""
Factor = Annotated[float, Range(0, 1e6, above=True)]
"""Multiplies something: positive, and small enough to be multiplied again."""
Gibibytes = Annotated[float, Range(0, 1e6, above=True)]


# ------------------------------------------------------------------ on the command line


def whole(low: int = 1, high: int = 10**9) -> Callable[[str], int]:
    """Returns a type for argparse that takes whole numbers from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if fault := Range(low, high).fault(value):
            raise ArgumentTypeError(fault)
        return value

    return read
