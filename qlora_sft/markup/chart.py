"""Draw curves as a figure: lines in SVG, which stretch with the page, and labels in HTML, which do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

from qlora_sft.markup.axis import Axis, axis_of, drawable, step_axis
from qlora_sft.markup.elements import table
from qlora_sft.markup.series import Series, present, stretches, thinned
from qlora_sft.markup.text import attribute, escape
from qlora_sft.units import figure

COLOURS, DASHES = 7, 3
# Curves of one chart; nobody can tell more apart.
MOST_SERIES = 14
# Curves whose names stand at their ends; more have a legend.
MOST_LABELS = 6
BANDS, MOST_DOTS, TABLE_ROWS = 60, 80, 24
# Height of a label as a share of the plot.
LABEL = 0.085
Value = TypeVar("Value")


@dataclass(frozen=True)
class Chart:
    """Holds what one figure shows."""

    title: str
    unit: str
    series: Sequence[Series]
    note: str = ""
    """What has to be known to read it."""
    levels: Sequence[tuple[float, str]] = ()
    """Horizontal lines with their names."""
    marks: Sequence[tuple[float, str]] = ()
    """Vertical lines with their names."""
    missing: Sequence[float] = ()
    """Places at which there should be a value and is none."""
    zero: bool = False
    """Whether the vertical axis begins at zero."""
    write: Callable[[float | None], str] = figure
    """Writes a value."""
    write_tick: Callable[[float | None], str] | None = None
    """Writes a value of the vertical axis; default: as any other."""
    horizontal: str = "step"


@dataclass(frozen=True)
class _Frame:
    x: Axis
    y: Axis
    chart: Chart
    named: Sequence[Series] = field(default=())
    """The curves that are told apart by colour, with it."""

    def place(self, x: float, y: float) -> str:
        return f"{round(1000 * self.x.at(x))} {round(1000 * (1 - self.y.at(y)))}"


def draw(chart: Chart) -> str:
    """Returns the figure of ``chart``, with its values as a table below it; nothing if it has no value."""
    drawn = _drawn(chart)
    points = [point for each in drawn for point in present(each.points)]
    if not points:
        return ""
    steps = [x for each in drawn for x, _ in each.points]
    frame = _Frame(
        step_axis(steps), axis_of([y for _, y in points] + [y for y, _ in chart.levels], chart.zero), chart,
        [each for each in drawn if not each.faint],
    )  # fmt: skip
    left_out = len({each.name for each in chart.series if not each.faint and present(each.points)}) - len(frame.named)
    notes = [chart.note, "logarithmic axis" if frame.y.log else ""]
    if left_out > 0:
        notes.append(f"{len(frame.named)} of {len(frame.named) + left_out} curves are drawn; the table has all")
    note = "; ".join(filter(None, notes))
    several = len(frame.named) > 1
    labels = _end_labels(frame) if several and len(frame.named) <= MOST_LABELS else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b> <span>{escape(chart.unit)}</span>'
        f"{f'<small>{escape(note)}</small>' if note else ''}</figcaption>"
        f"{_legend(frame) if several and not labels else ''}"
        f'<div class="plot{" labelled" if labels else ""}">'
        f"{_y_labels(frame)}{_svg(frame, drawn)}{labels}{_x_labels(frame)}"
        f"</div>{_values(chart)}</figure>"
    )


def _drawn(chart: Chart) -> list[Series]:
    """Returns the curves that are drawn, made fewer points, each with its colour."""
    names = list(dict.fromkeys(each.name for each in chart.series if not each.faint and present(each.points)))
    names = names[:MOST_SERIES]
    faint = [each for each in chart.series if each.faint]
    bold = [each for each in chart.series if not each.faint and each.name in names]
    return [
        replace(
            each,
            points=thinned([(x, y if y is not None and drawable(y) else None) for x, y in each.points]),
            colour=each.colour if each.colour is not None else names.index(each.name) if each.name in names else 0,
        )
        for each in [*faint, *bold]
    ]


def style_of(number: int) -> str:
    """Returns the classes of the curve with this number: a colour, and a dash where the colours are used up."""
    return f"s{number % COLOURS} d{number // COLOURS % DASHES}"


# ------------------------------------------------------------------ the SVG


def _svg(frame: _Frame, drawn: Sequence[Series]) -> str:
    chart = frame.chart
    lines = [f'<path class="grid" d="M0 {round(1000 * (1 - frame.y.at(y)))}h1000"/>' for y in frame.y.ticks()]
    lines += [f'<path class="level" d="M0 {round(1000 * (1 - frame.y.at(y)))}h1000"/>' for y, _ in chart.levels]
    lines += [f'<path class="mark" d="M{round(1000 * frame.x.at(x))} 0v1000"/>' for x, _ in _inside(frame)]
    lines += [_curve(frame, each) for each in drawn]
    places = sorted({round(1000 * frame.x.at(x)) for x in chart.missing})
    if places:
        lines.append(f'<path class="missing" d="{"".join(f"M{x} 1000v-60" for x in places)}"/>')
    lines += _bands(frame, drawn)
    return (
        f'<svg role="img" aria-label="{attribute(f"{chart.title}. {_described(frame)}")}" viewBox="0 0 1000 1000" '
        f'preserveAspectRatio="none"><title>{attribute(chart.title)}</title>'
        f"{''.join(lines)}</svg>"
    )


def _inside(frame: _Frame) -> list[tuple[float, str]]:
    return [(x, name) for x, name in frame.chart.marks if 0 <= frame.x.at(x) <= 1]


def _curve(frame: _Frame, series: Series) -> str:
    tone = f"{style_of(series.colour or 0)}{' faint' if series.faint else ''}"
    pieces = stretches(series.points)
    lines = "".join(
        f"M{frame.place(*piece[0])}" + "".join(f"L{frame.place(x, y)}" for x, y in piece[1:]) for piece in pieces
    )
    result = f'<path class="line {tone}" d="{lines}"/>'
    single = [piece[0] for piece in pieces if len(piece) == 1]
    dots = [point for piece in pieces for point in piece] if series.dots else single
    if dots and len(dots) <= MOST_DOTS:
        result += f'<path class="dots {tone}" d="{"".join(f"M{frame.place(x, y)}h.01" for x, y in dots)}"/>'
    return result


def _described(frame: _Frame) -> str:
    """Returns in words what the curves do, for those who do not see them."""
    write = frame.chart.write
    words = []
    for each in frame.named:
        points = present(each.points)
        if points:
            first, last = points[0], points[-1]
            words.append(
                f"{each.name}: {write(first[1])} at {frame.chart.horizontal} {figure(first[0])}, "
                f"{write(last[1])} at {frame.chart.horizontal} {figure(last[0])}"
            )
    return "; ".join(words)


def _bands(frame: _Frame, drawn: Sequence[Series]) -> list[str]:
    """Returns invisible stripes over the plot, each with the values below the pointer as its title."""
    steps = sorted({x for each in frame.named for x, _ in each.points})
    chosen = spread(steps, BANDS)
    if len(chosen) < 2:
        return []
    values = [(each.name, dict(each.points)) for each in frame.named]
    places = [1000 * frame.x.at(x) for x in chosen]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(places)), 1000.0]
    result = []
    for x, (start, end) in zip(chosen, pairwise(edges), strict=True):
        there = [f"{name} {frame.chart.write(at[x])}" for name, at in values if at.get(x) is not None]
        title = attribute(f"{frame.chart.horizontal} {figure(x)}: {', '.join(there) or 'no value'}")
        result.append(f'<rect x="{start:.0f}" width="{end - start:.0f}" height="1000"><title>{title}</title></rect>')
    return result


def spread(values: Sequence[Value], most: int) -> list[Value]:
    """Returns at most ``most`` of the values at equal distances, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[number * (len(values) - 1) // (most - 1)] for number in range(most)]


# ------------------------------------------------------------------ the labels


def _y_labels(frame: _Frame) -> str:
    labels = [(1 - frame.y.at(y), (frame.chart.write_tick or frame.chart.write)(y)) for y in frame.y.ticks()]
    spans = "".join(f'<span style="top:{100 * at:.1f}%">{escape(text)}</span>' for at, text in labels if 0 <= at <= 1)
    return f'<div class="y" aria-hidden="true">{spans}</div>'


def _x_labels(frame: _Frame) -> str:
    low, high = frame.x.low, frame.x.high
    ticks = [x for x in frame.x.ticks(4) if x == int(x)] if high - low > 1 else [round((low + high) / 2)]
    spans = []
    for x in ticks:
        at = frame.x.at(x)
        side = " first" if at < 0.04 else " last" if at > 0.96 else ""
        spans.append(f'<span class="tick{side}" style="left:{100 * at:.1f}%">{figure(x)}</span>')
    for x, name in _inside(frame):
        side = " last" if frame.x.at(x) > 0.5 else " first"
        spans.append(f'<span class="at{side}" style="left:{100 * frame.x.at(x):.1f}%">{escape(name)}</span>')
    for y, name in frame.chart.levels:
        spans.append(f'<span class="of" style="top:{100 * (1 - frame.y.at(y)):.1f}%">{escape(name)}</span>')
    return f'<div class="x" aria-hidden="true">{"".join(spans)}</div>'


def _end_labels(frame: _Frame) -> str:
    """Writes the name of every curve at its end, moved apart where they would cover each other."""
    ends = [(1 - frame.y.at(points[-1][1]), each) for each in frame.named if (points := present(each.points))]
    ends.sort(key=lambda end: end[0])
    places: list[float] = []
    for at, _ in ends:
        places.append(max(at, places[-1] + LABEL) if places else max(at, LABEL / 2))
    low = 1 - LABEL / 2
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], low)
        low = places[index] - LABEL
    spans = "".join(
        f'<span class="{style_of(each.colour or 0)}" style="top:{100 * at:.1f}%" title="{attribute(each.name)}">'
        f"{escape(each.name)}</span>"
        for at, (_, each) in zip(places, ends, strict=True)
    )
    return f'<div class="ends" aria-hidden="true">{spans}</div>'


def _legend(frame: _Frame) -> str:
    items = "".join(
        '<span><svg aria-hidden="true" viewBox="0 0 24 8">'
        f'<path class="line {style_of(each.colour or 0)}" d="M1 4h22"/></svg>{escape(each.name)}</span>'
        for each in frame.named
    )
    return f'<div class="legend">{items}</div>'


def _values(chart: Chart) -> str:
    """Returns the values as a table that opens, at most `TABLE_ROWS` of them."""
    named = [each for each in chart.series if not each.faint and present(each.points)]
    steps = sorted({x for each in named for x, _ in each.points})
    chosen = spread(steps, TABLE_ROWS)
    seen = set(chosen)
    columns = [{x: y for x, y in each.points if x in seen} for each in named]
    rows = [[figure(x), *(chart.write(column.get(x)) for column in columns)] for x in chosen]
    of = f"{len(chosen)} of {len(steps):,}" if len(chosen) < len(steps) else f"all {len(steps)}"
    body = table([chart.horizontal, *(each.name for each in named)], rows)
    return f"<details><summary>Values <small>({of} {chart.horizontal}s)</small></summary>{body}</details>"
