"""Shares, counts and order of a mixture: as asked to within one row, the same every time, nothing too often."""

import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_sft.config_data import DataConfig, ReplayConfig, TrainSourceConfig
from qlora_sft.data.mixture import (
    epoch_counts,
    largest_remainder,
    mixture_table,
    order_digest,
    plan_order,
    replay_count,
    shares,
)


def config(
    names: str, replay: float | None = None, per_source: dict[str, list[float]] | None = None, **options: Any
) -> DataConfig:
    """Sources of one letter each; ``per_source``: option -> its value for each of them."""
    train = [
        TrainSourceConfig(name, **{key: values[i] for key, values in (per_source or {}).items()})
        for i, name in enumerate(names)
    ]
    return DataConfig(train, replay=ReplayConfig("general", share=replay) if replay else None, **options)


# ------------------------------------------------------------------ shares and counts


def test_the_four_strategies() -> None:
    rows = {"a": 100, "b": 400}
    assert shares(rows, config("ab")) == {"a": Fraction(1, 5), "b": Fraction(4, 5)}
    assert shares(rows, config("ab", mixture="temperature", temperature=2.0)) == {
        "a": Fraction(1, 3),
        "b": Fraction(2, 3),
    }
    quality = config("ab", mixture="quality", per_source={"quality": [2.0, 0.5]})
    assert shares(rows, quality) == {"a": Fraction(1, 2), "b": Fraction(1, 2)}
    explicit = config("ab", mixture="explicit", per_source={"weight": [0.3, 0.1]})
    assert shares(rows, explicit) == {"a": Fraction(3, 4), "b": Fraction(1, 4)}
    assert epoch_counts(rows, explicit) == {"a": 375, "b": 125}


def test_a_repeated_source_comes_as_if_it_were_named_twice() -> None:
    doubled = config("ab", per_source={"repeat": [2.0, 1.0]})
    assert epoch_counts({"a": 10, "b": 30}, doubled) == {"a": 20, "b": 30}
    (picks,) = plan_order({"a": 10, "b": 30}, doubled, 1, seed=0)
    assert Counter(Counter(picks).values()) == {2: 10, 1: 30}


ROWS = st.lists(st.integers(1, 60), min_size=1, max_size=4)
STRATEGY = st.sampled_from(["proportional", "temperature", "quality", "explicit"])
NUMBERS = st.lists(st.integers(1, 50).map(lambda n: n / 10), min_size=4, max_size=4)


def mixed(strategy: str, count: int, numbers: list[float], repeats: list[float], **options: Any) -> DataConfig:
    per_source = {"repeat": repeats}
    if strategy in ("quality", "explicit"):
        per_source["weight" if strategy == "explicit" else "quality"] = numbers
    temperature = numbers[0] + 0.5 if strategy == "temperature" else None
    return config("abcd"[:count], per_source=per_source, mixture=strategy, temperature=temperature, **options)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 10_000))
def test_largest_remainder_sums_to_the_total_and_is_less_than_one_off(masses: list[int], total: int) -> None:
    parts = [Fraction(mass, sum(masses)) for mass in masses]
    counts = largest_remainder(parts, total)
    assert sum(counts) == total
    assert all(abs(count - part * total) < 1 for count, part in zip(counts, parts, strict=True))


def test_what_is_missing_goes_to_the_largest_remainders_the_earlier_first() -> None:
    tenths = [Fraction(part, 10) for part in (1, 5, 4)]
    assert largest_remainder(tenths, 3) == [0, 2, 1]
    assert largest_remainder([Fraction(1, 3)] * 3, 2) == [1, 1, 0]


@given(STRATEGY, ROWS, NUMBERS, NUMBERS)
def test_counts_are_within_one_row_of_the_shares(
    strategy: str, rows: list[int], numbers: list[float], repeats: list[float]
) -> None:
    data = mixed(strategy, len(rows), numbers, repeats)
    have = dict(zip("abcd", rows, strict=False))
    offered = {
        name: max(1, round(count * Fraction(str(r)))) for (name, count), r in zip(have.items(), repeats, strict=False)
    }
    counts = epoch_counts(have, data)
    total = sum(counts.values())
    assert total == sum(offered.values())
    # The formulas once more, in floating point.
    mass = {
        "proportional": lambda i, n: n,
        "temperature": lambda i, n: n ** (1 / (numbers[0] + 0.5)),
        "quality": lambda i, n: n * numbers[i],
        "explicit": lambda i, n: numbers[i],
    }[strategy]
    masses = {name: mass(i, n) for i, (name, n) in enumerate(offered.items())}
    for name, count in counts.items():
        assert abs(count - total * masses[name] / sum(masses.values())) < 1 + 1e-6


# ------------------------------------------------------------------ the order


@given(STRATEGY, ROWS, NUMBERS, NUMBERS, st.integers(1, 3), st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_row_comes_about_equally_often_and_the_seed_decides_the_order(
    strategy: str, rows: list[int], numbers: list[float], repeats: list[float], epochs: int, seed: int, replay: bool
) -> None:
    data = mixed(strategy, len(rows), numbers, repeats, replay=0.2 if replay else None)
    have = {**dict(zip("abcd", rows, strict=False)), **({"general": 7} if replay else {})}
    order = plan_order(have, data, epochs, seed)
    assert order == plan_order(have, data, epochs, seed)
    assert len(order) == epochs
    drawn = Counter(pick for picks in order for pick in picks)
    for name, count in have.items():
        of_source = [drawn[(name, row)] for row in range(count)]
        total = sum(n for (source, _), n in drawn.items() if source == name)
        assert sum(of_source) == total
        assert max(of_source) <= math.ceil(total / count)
        assert min(of_source) >= total // count
    counts = epoch_counts({name: n for name, n in have.items() if name != "general"}, data)
    for picks in order:
        trained = Counter(name for name, _ in picks if name != "general")
        assert trained == Counter({name: n for name, n in counts.items() if n})


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = plan_order({"a": 50}, config("a"), 2, seed=0)
    assert first != second
    assert sorted(first) == sorted(second)
    assert plan_order({"a": 50}, config("a"), 1, seed=1) != [first]


def test_the_order_is_the_same_in_every_process_and_on_every_machine() -> None:
    """The digest was computed once; a change of it means that runs cannot be resumed across the change."""
    code = (
        "from qlora_sft.config_data import *\n"
        "from qlora_sft.data.mixture import *\n"
        "data = DataConfig([TrainSourceConfig('a'), TrainSourceConfig('b')], mixture='temperature', temperature=3.0,\n"
        "    replay=ReplayConfig('general', share=0.1), curriculum='progressive')\n"
        "print(order_digest(plan_order({'a': 300, 'b': 20, 'general': 9}, data, 2, 5)))\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": s}, capture_output=True, text=True
        ).stdout
        for s in ("1", "2")
    }
    assert printed == {"50543d8a913949bf0b8dbb2cd9ee0c0f10531b23ec30d553348ec2aa6866b231\n"}


# ------------------------------------------------------------------ replay and curriculum


@given(st.integers(1, 500), st.integers(1, 99))
def test_replay_has_the_share_of_all_rows_that_was_asked_for(trained: int, percent: int) -> None:
    count = replay_count(trained, percent / 100)
    # One row more or less of replay would not come closer.
    error = abs(Fraction(count) - Fraction(percent, 100 - percent) * trained)
    assert error <= Fraction(1, 2)


@pytest.mark.parametrize("epochs", [1, 3])
def test_replay_is_spread_evenly_over_the_run(epochs: int) -> None:
    order = plan_order({"a": 900, "general": 40}, config("a", replay=0.1), epochs, seed=0)
    flags = [name == "general" for picks in order for name, _ in picks]
    assert sum(flags) == 100 * epochs
    for start in range(0, len(flags), 100):
        assert 9 <= sum(flags[start : start + 100]) <= 11


@given(st.integers(200, 800), st.sampled_from([0.05, 0.2, 0.5]))
@settings(deadline=None, max_examples=20)
def test_a_progressive_curriculum_falls_from_twice_the_share_to_nothing(trained: int, share: float) -> None:
    data = config("a", replay=share, curriculum="progressive")
    order = plan_order({"a": trained, "general": 30}, data, 1, seed=0)
    flags = [name == "general" for picks in order for name, _ in picks]
    total, replayed = len(flags), sum(flags)
    assert abs(replayed - share * total) < 1
    for tenth in range(1, 11):
        x = round(total * tenth / 10) / total
        assert abs(sum(flags[: round(total * x)]) - replayed * (2 * x - x * x)) <= 1
    assert len(order) == min(20, total // 64)
    assert max(map(len, order)) - min(map(len, order)) <= 1


def test_the_table_shows_what_is_trained_on_not_what_there_is() -> None:
    data = config("ab", mixture="explicit", per_source={"weight": [1.0, 1.0]})
    facts = {"a": [(10, 5, 5.0)] * 10, "b": [(30, 10, 20.0)] * 90}
    table = mixture_table(plan_order({"a": 10, "b": 90}, data, 2, seed=0), facts).splitlines()
    assert table[1].split() == ["a", "100", "(50.0%)", "1,000", "(25.0%)", "500", "(33.3%)", "20.0%", "10.00x"]
    assert table[2].split() == ["b", "100", "(50.0%)", "3,000", "(75.0%)", "1,000", "(66.7%)", "80.0%", "1.11x"]


def test_the_digest_tells_orders_apart() -> None:
    assert order_digest([[1, 2], [3]]) == order_digest([[1, 2], [3]])
    assert len({order_digest(order) for order in ([[1, 2], [3]], [[1], [2, 3]], [[2, 1], [3]])}) == 3


# ------------------------------------------------------------------ parts of an epoch


@given(STRATEGY, ROWS, NUMBERS, NUMBERS, st.integers(0, 2), st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_part_of_an_epoch_comes_behind_the_whole_ones_with_its_share_of_every_source(
    strategy: str, rows: list[int], numbers: list[float], repeats: list[float], whole: int, part: float, replay: bool
) -> None:
    data = mixed(strategy, len(rows), numbers, repeats, replay=0.2 if replay else None)
    have = {**dict(zip("abcd", rows, strict=False)), **({"general": 7} if replay else {})}
    trained = {name: n for name, n in have.items() if name != "general"}
    order = plan_order(have, data, whole + part, seed=3)
    assert len(order) == whole + 1
    only = [[pick for pick in picks if pick[0] != "general"] for picks in order]
    assert only[:whole] == [
        [pick for pick in picks if pick[0] != "general"]
        for picks in (plan_order(have, data, whole, 3) if whole else [])
    ]
    counts = epoch_counts(trained, data)
    assert len(only[-1]) == max(1, round(Fraction(str(part)) * sum(counts.values())))
    drawn = Counter(name for name, _ in only[-1])
    assert all(abs(drawn[name] - part * counts[name]) < 2.5 for name in trained)
    replayed = sum(len(picks) for picks in order) - sum(map(len, only))
    assert replayed == (replay_count(sum(map(len, only)), 0.2) if replay else 0)


def test_half_an_epoch_is_half_of_every_source_and_no_row_twice() -> None:
    (picks,) = plan_order({"a": 100, "b": 40}, config("ab"), 0.5, seed=0)
    assert Counter(name for name, _ in picks) == {"a": 50, "b": 20}
    assert len(set(picks)) == 70
    assert plan_order({"a": 100, "b": 40}, config("ab"), 1.0, seed=0) == plan_order(
        {"a": 100, "b": 40}, config("ab"), 1, 0
    )
