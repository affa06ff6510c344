"""Draw shares as bars and changes as intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_sft.markup.axis import Axis
from qlora_sft.markup.elements import Markup
from qlora_sft.markup.text import attribute, escape
from qlora_sft.units import figure


@dataclass(frozen=True)
class Bar:
    """Holds one bar: its name, its length, how much of it is filled, and what is said beside it."""

    name: str
    value: float
    filled: float
    text: str


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Returns horizontal bars below each other; the longest takes the whole width."""
    longest = max((row.value for row in rows), default=0.0) or 1.0
    drawn = "".join(_bar(row, longest) for row in rows)
    return Markup(f'<div class="bars" role="list" aria-label="{attribute(title)}">{drawn}</div>' if rows else "")


def _bar(row: Bar, longest: float) -> str:
    width, filled = 1000 * row.value / longest, 1000 * row.filled / longest
    return (
        f'<div role="listitem"><span title="{attribute(row.name)}">{escape(row.name)}</span>'
        '<svg aria-hidden="true" viewBox="0 0 1000 10" preserveAspectRatio="none">'
        f"<title>{attribute(f'{row.name}: {row.text}')}</title>"
        f'<rect class="whole" width="{width:.0f}" height="10"/>'
        f'<rect class="part" width="{filled:.0f}" height="10"/></svg>'
        f"<small>{escape(row.text)}</small></div>"
    )


@dataclass(frozen=True)
class Interval:
    """Holds a change with the edges of its interval."""

    name: str
    difference: float
    low: float
    high: float
    text: str
    good: bool | None
    """Whether it is a change for the better; None if it may be none at all."""


def intervals(title: str, rows: Sequence[Interval], write: Callable[[float], str] = figure) -> Markup:
    """Returns changes on one axis, with a line at zero."""
    if not rows:
        return Markup("")
    low, high = min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows))
    room = (high - low) * 0.06 or 1.0
    axis = Axis(low - room, high + room)
    drawn = "".join(_interval(row, axis) for row in rows)
    zero = f"{100 * axis.at(0):.1f}%"
    scale = "".join(
        f'<span style="left:{100 * axis.at(x):.1f}%">{escape(write(x))}</span>'
        for x in axis.ticks(4)
        if low <= x <= high
    )
    return Markup(
        f'<div class="intervals" role="list" aria-label="{attribute(title)}" style="--zero:{zero}">{drawn}'
        f'<div class="scale" aria-hidden="true"><div>{scale}</div></div></div>'
    )


def _interval(row: Interval, axis: Axis) -> str:
    low, middle, high = (round(1000 * axis.at(x)) for x in (row.low, row.difference, row.high))
    zero = round(1000 * axis.at(0))
    tone = "open" if row.good is None else "good" if row.good else "bad"
    return (
        f'<div role="listitem"><span>{escape(row.name)}</span>'
        '<svg aria-hidden="true" viewBox="0 0 1000 20" preserveAspectRatio="none">'
        f"<title>{attribute(f'{row.name}: {row.text}')}</title>"
        f'<path class="zero" d="M{zero} 0v20"/><path class="span {tone}" d="M{low} 10H{high}"/>'
        f'<path class="dots {tone}" d="M{middle} 10h.01"/></svg><small>{escape(row.text)}</small></div>'
    )
