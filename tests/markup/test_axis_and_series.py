"""Axes hold what they are made for, and curves are made fewer or smoother without losing a peak or a gap."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_sft.markup.axis import axis_of, drawable, step_axis
from qlora_sft.markup.series import present, smoothed, smoothing_window, stretches, thinned
from qlora_sft.units import duration, figure, nats, share, size

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
POINTS = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=400)


@settings(max_examples=200, deadline=None)
@given(st.lists(FLOATS.filter(drawable), min_size=1, max_size=20), st.booleans())
@example([1e100, -1e100], False)
@example([1e-100], True)
@example([0.3, 0.3], False)
@example([1e-9, 1e-9, 1e9], True)
def test_an_axis_holds_its_values_and_its_ticks(values: list[float], zero: bool) -> None:
    axis = axis_of(values, zero)
    assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    assert all(math.isfinite(tick) for tick in ticks)
    if zero and min(values) >= 0 and not axis.log:
        assert axis.at(0) == 0


def test_ticks_are_round_numbers() -> None:
    assert axis_of([0.02, 2.6], zero=True).ticks() == [0, 1, 2]
    assert axis_of([0, 5e-4], zero=True).ticks() == [0, 2e-4, 4e-4]
    assert axis_of([0.01, 0.02, 900]).log
    assert axis_of([0.01, 0.02, 900]).ticks() == [0.01, 1, 100]
    assert not axis_of([-1, 0.02, 900]).log
    assert step_axis([7]).at(7) == 0.5


@settings(max_examples=100, deadline=None)
@given(POINTS, st.integers(4, 60))
def test_fewer_points_keep_the_peaks_and_the_order(values: list[float | None], most: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    few = thinned(points, most)
    assert len(few) <= most or len(few) <= len(points)
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    there, kept = [y for _, y in present(points)], [y for _, y in present(few)]
    if there:
        assert (min(kept), max(kept)) == (min(there), max(there))
    assert set(few) <= {*points, *((x, None) for x, _ in points)}


def test_a_long_stretch_without_values_stays_a_gap() -> None:
    points = [(float(step), None if 3000 <= step < 6000 else 1.0) for step in range(9000)]
    few = thinned(points)
    assert len(few) <= 600
    assert len(stretches(few)) == 2


@settings(max_examples=50, deadline=None)
@given(POINTS, st.sampled_from([1, 3, 5, 21]))
def test_a_smoothed_curve_is_the_weighted_mean(values: list[float | None], window: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    drawn = random.Random(len(values))
    weights = [drawn.randint(1, 500) for _ in values]
    result = smoothed(points, [float(weight) for weight in weights], window)
    sizes = sorted(abs(y) for _, y in present(points))
    if not sizes or sizes[-1] > 1e6 * max(sizes[len(sizes) // 2], 1e-6):
        assert result == points
        return
    for index, value in enumerate(values):
        half = min(window // 2, index)
        near = [
            (values[i], weights[i])
            for i in range(index - half, min(index + half + 1, len(values)))
            if values[i] is not None
        ]
        if value is None:
            assert result[index][1] is None
        else:
            mean = math.fsum(y * w for y, w in near if y is not None) / sum(w for _, w in near)
            assert result[index][1] == pytest.approx(mean, abs=1e-6 * sizes[-1], rel=1e-6)


def test_short_runs_are_not_smoothed() -> None:
    assert [smoothing_window(count) for count in (0, 1, 11, 12, 64, 1000)] == [1, 1, 1, 5, 5, 51]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.53214, "0.5321"), (12.345, "12.35"), (48_200.4, "48,200"), (5e-5, "5e-5"), (0, "0"), (-1.5, "-1.5"),
     (None, "–"), (2.0, "2"), (1.25e9, "1.25e9"), (100, "100")],
)  # fmt: skip
def test_figures_are_short(value: float | None, expected: str) -> None:
    assert figure(value) == expected


def test_other_units() -> None:
    assert (nats(0.5), nats(None), nats(1e9)) == ("0.500", "–", "1e9")
    assert (share(0.4312), share(1.0), share(0.5), share(None)) == ("43.1%", "100%", "50%", "–")
    assert (size(1 << 30), size(512), duration(45), duration(600), duration(9000)) == (
        "1.00 GiB", "512 B", "45 s", "10 min", "2.5 h",
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(FLOATS)
def test_every_number_can_be_written(value: float) -> None:
    for text in (figure(value), nats(value), share(value)):
        assert text
