"""Reads a learning rate off the curve of a range test, and draws that curve as text and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qlora_sft.markup.chart import Chart, draw
from qlora_sft.markup.elements import note, page, preformatted
from qlora_sft.markup.series import Series
from qlora_sft.markup.style import style
from qlora_sft.markup.text import escape
from qlora_sft.run.report import Report
from qlora_sft.units import figure, nats

# Share of the last value in the next one of the smoothed curve.
SMOOTHING = 0.8
# The rate is so many times below the one at which the loss was lowest.
BELOW = 10
# A smaller fall, as a share of the loss before training, says nothing.
LEAST_FALL = 0.01
# Rows and columns of the curve in a terminal.
HEIGHT, WIDTH = 12, 64


class Tried(NamedTuple):
    """Holds one step of a range test."""

    rate: float
    before: float
    """The loss of the step's rows before training."""
    loss: float
    """Their loss when it was their turn."""

    @property
    def change(self) -> float:
        return self.loss - self.before


@dataclass(frozen=True)
class RateReport(Report):
    """Says which learning rate a range test suggests, and why."""

    suggested: float | None
    """None if the loss fell at no rate."""
    reason: str
    rates: list[float]
    changes: list[float]
    """By how much the loss of a step's rows was above that before training."""
    page: str
    """The file with the curve."""


def smoothed(values: Sequence[float]) -> list[float]:
    """Returns exponential means of the values up to each, whose beginning does not count as zeros."""
    result, mean = [], 0.0
    for number, value in enumerate(values, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        result.append(mean / (1 - SMOOTHING**number))
    return result


def suggest(tried: Sequence[Tried]) -> tuple[float | None, str]:
    """Returns a learning rate and the reason for it; None if the curve does not tell one.

    It is a tenth of the rate at which the smoothed loss is lowest, as in fastai's finder: at the lowest point a step
    gains as much as it spoils, and training stays near its highest rate for long.
    """
    curve = smoothed([each.change for each in tried])
    lowest = min(range(len(curve)), key=curve.__getitem__, default=0)
    if not tried or -curve[lowest] < LEAST_FALL * tried[lowest].before:
        return None, (
            "the loss of the rows fell at no rate by more than 1%, so the curve suggests none; look at the masks with "
            "`preview`, and take more rows or more tokens per step"
        )
    rate = _rounded(tried[lowest].rate / BELOW)
    end = "" if lowest < len(tried) - 1 else ", where the test ends"
    return rate, (
        f"a tenth of {tried[lowest].rate:.1e}{end}, at which the loss of the rows was lowest "
        f"({-curve[lowest]:.3f} below that before training) and beyond which a step spoils more than it gains"
    )


def _rounded(rate: float) -> float:
    """Returns the nearest of 1, 2, 3, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rate))
    nearest = min((1, 2, 3, 5, 10), key=lambda factor: abs(math.log(factor * power / rate)))
    return float(f"{nearest * power:.0e}")


def text_curve(tried: Sequence[Tried]) -> str:
    """Draws the smoothed curve for a terminal: the change of the loss over the logarithm of the rate."""
    curve = smoothed([each.change for each in tried])
    # What a step beyond all sense has spoiled would flatten the rest.
    top = max(curve[0], 0.0, -min(curve)) if curve else 1.0
    low = min([*curve, 0.0])
    high = max(min(max(curve, default=1.0), max(top, 1e-3)), low + 1e-6)
    logs = [math.log10(each.rate) for each in tried]
    span = max(logs[-1] - logs[0], 1e-9)
    cells = [[" "] * WIDTH for _ in range(HEIGHT)]
    for x, y in zip(logs, curve, strict=True):
        row = round((high - min(y, high)) / (high - low) * (HEIGHT - 1))
        cells[row][round((x - logs[0]) / span * (WIDTH - 1))] = "*"
    lines = [f"{high - (high - low) * row / (HEIGHT - 1):>+9.3f} |{''.join(line)}" for row, line in enumerate(cells)]
    marks = [" "] * (WIDTH + 8)
    for power in range(math.ceil(logs[0] - 1e-9), math.floor(logs[-1] + 1e-9) + 1):
        place = round((power - logs[0]) / span * (WIDTH - 1))
        marks[place : place + 5] = f"1e{power:<3}"
    return "\n".join(
        ["change of the loss of a step's rows over its learning rate", *lines, f"{'':>9} +{'-' * WIDTH}",
         f"{'':>11}{''.join(marks).rstrip()}"]
    )  # fmt: skip


def said_of(report: RateReport) -> str:
    """Returns what a terminal shows of a range test."""
    found = f"training.learning_rate: {report.suggested:g}" if report.suggested else "no learning rate is suggested"
    tried = [Tried(rate, 0.0, change) for rate, change in zip(report.rates, report.changes, strict=True)]
    return f"{text_curve(tried)}\n\n{found} ({report.reason})\ncurve: {report.page}"


def rate_page(tried: Sequence[Tried], suggested: float | None, reason: str, title: str) -> str:
    """Returns a page with the curve, over the logarithm of the rate."""
    curve = smoothed([each.change for each in tried])
    places = [math.log10(each.rate) for each in tried]
    raw = Series("change", [(x, each.change) for x, each in zip(places, tried, strict=True)], faint=True, colour=0)
    mean = Series("change", list(zip(places, curve, strict=True)), colour=0)
    marks = [(math.log10(suggested), f"suggested: {suggested:g}")] if suggested else []
    chart = Chart(
        "Change of the loss", "nats per supervised token, against the same rows before training", [raw, mean],
        "over the power of ten of the learning rate: -4 is 0.0001", marks=marks, write=nats, write_tick=figure,
        horizontal="power",
    )  # fmt: skip
    head = f"training.learning_rate: {suggested:g}" if suggested else "no learning rate is suggested"
    body = f"<header><h1>{escape(title)}</h1></header>{preformatted(head)}{note(reason)}{draw(chart)}"
    return page(title, style(), body)
