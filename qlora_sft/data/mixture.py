"""Decide which row of which source is trained on when: shares, counts and the order of a whole run.

Everything is exact arithmetic on counts, and `random.Random` with text seeds. So the same configuration, counts and
seed give the same order on every machine.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, islice, pairwise

from qlora_sft.config_data import DataConfig, source_name

Pick = tuple[str, int]
"""Names a source and the number of one of its documents, counted from 0 among those that are kept."""

# A curriculum is packed in this many stretches; each leaves at most about one packed sequence unfilled.
_STRETCHES = 20
_LEAST_ROWS = 64


def shares(rows: dict[str, int], config: DataConfig) -> dict[str, Fraction]:
    """Returns the share p_k of each training source in an epoch, from ``rows[k]``, the rows it offers (N_k * repeat_k).

    proportional: p_k = N_k / sum N;  temperature: p_k ~ N_k^(1/T);  quality: p_k ~ N_k q_k;  explicit: p_k ~ weight_k.
    """
    sources = {source_name(source): source for source in config.train}
    mass: dict[str, Fraction] = {}
    for name, count in rows.items():
        source = sources[name]
        if config.mixture == "temperature":
            # The last digits of a power differ between machines' libraries; twelve digits are the same on all.
            mass[name] = Fraction(f"{count ** (1 / (config.temperature or 1)):.12g}")
        elif config.mixture == "quality":
            quality = 1.0 if source.quality is None else source.quality
            assert not isinstance(quality, str), "run_data has a number put in its place"
            mass[name] = count * _exact(quality)
        elif config.mixture == "explicit":
            mass[name] = _exact(source.weight or 0.0)
        else:
            mass[name] = Fraction(count)
    total = sum(mass.values())
    return {name: part / total for name, part in mass.items()}


def largest_remainder(parts: Sequence[Fraction], total: int) -> list[int]:
    """Returns whole numbers that sum to ``total``, each less than one away from ``total * part`` (parts sum to 1).

    All are rounded down; what is missing goes to those with the largest remainder, the earlier first.
    """
    quotas = [part * total for part in parts]
    counts = [int(quota) for quota in quotas]
    missing = total - sum(counts)
    for index in sorted(range(len(parts)), key=lambda i: counts[i] - quotas[i])[:missing]:
        counts[index] += 1
    return counts


def epoch_counts(rows: dict[str, int], config: DataConfig, part: Fraction = Fraction(1)) -> dict[str, int]:
    """Returns the rows of each training source in one epoch, which has sum(N_k * repeat_k) rows in all.

    rows: maps a source to the number of its rows (N_k).

    part: of an epoch, which then has at least one row.
    """
    repeat = {source_name(source): _exact(source.repeat) for source in config.train}
    offered = {name: max(1, round(count * repeat[name])) for name, count in rows.items()}
    p = shares(offered, config)
    total = max(1, round(part * sum(offered.values())))
    return dict(zip(p, largest_remainder(list(p.values()), total), strict=True))


def replay_count(trained: int, share: float) -> int:
    """Returns the rows R of replay that make up ``share`` of all rows: R = share / (1 - share) * trained, rounded."""
    return round(trained * _exact(share) / (1 - _exact(share)))


def plan_order(rows: dict[str, int], config: DataConfig, epochs: float, seed: int) -> list[list[Pick]]:
    """Returns the rows of the whole run in order, in stretches: packing may reorder within a stretch and not across.

    rows: maps a source (training sources and replay) to the number of its rows.

    Without a curriculum a stretch is an epoch, the last one perhaps a part of one. A source that gives fewer rows per
    epoch than it has goes on in the next epoch where it stopped, so that no row comes a second time before all have
    come once. None comes more often than ceil(rows drawn / rows there are).

    Replay is spread evenly, or, with ``curriculum: progressive``, so that its share falls from 2 * share at the
    beginning to 0 at the end: after a part x of the run, R * (2x - x^2) of its R rows have come (R * x without).
    """
    replay = source_name(config.replay) if config.replay else None
    trained = {name: count for name, count in rows.items() if name != replay}
    passes = {name: _passes(name, count, seed) for name, count in rows.items()}
    run = []
    parts = _epochs(epochs)
    for epoch, part in enumerate(parts):
        counts = epoch_counts(trained, config, part)
        picks = [(name, index) for name, count in counts.items() for index in islice(passes[name], count)]
        random.Random(f"mixture {seed} {epoch}").shuffle(picks)
        run.append(picks)
    if config.replay is None or replay is None:
        return run
    total = sum(map(len, run))
    wanted = replay_count(total, config.replay.share)
    if config.curriculum == "progressive":
        general = [(replay, index) for index in islice(passes[replay], wanted)]
        return _stretches(_merge([pick for picks in run for pick in picks], general, progressive=True))
    per_epoch = largest_remainder([part / sum(parts) for part in parts], wanted)
    return [
        _merge(picks, [(replay, index) for index in islice(passes[replay], count)], progressive=False)
        for picks, count in zip(run, per_epoch, strict=True)
    ]


def _epochs(number: float) -> list[Fraction]:
    """Returns the size of every epoch: 1 for the whole ones, and less for the rest behind them."""
    whole = int(number)
    rest = _exact(number) - whole
    return [Fraction(1)] * whole + ([rest] if rest else [])


def order_digest(order: object) -> str:
    """Returns the sha256 of an order (nested lists of numbers and texts): equal if and only if the order is."""
    return hashlib.sha256(json.dumps(order, separators=(",", ":")).encode()).hexdigest()


def _passes(name: str, rows: int, seed: int) -> Iterator[int]:
    """Yields all rows in random order, again and again, each pass in an order of its own."""
    number = 0
    while rows:
        order = list(range(rows))
        random.Random(f"rows {seed} {name} {number}").shuffle(order)
        yield from order
        number += 1


def _merge(trained: list[Pick], general: list[Pick], *, progressive: bool) -> list[Pick]:
    """Returns ``general`` among ``trained``, both in their order, at the places that `plan_order` describes."""
    count, total = len(general), len(trained) + len(general)

    def come(position: int) -> int:
        # count * (2x - x^2) or count * x at x = position / total, rounded to the nearest, in whole numbers.
        if progressive:
            return (2 * count * position * (2 * total - position) + total**2) // (2 * total**2)
        return (2 * count * position + total) // (2 * total)

    rest, merged = iter(trained), []
    for before, after in pairwise(come(position) for position in range(total + 1)):
        merged.append(general[before] if after > before else next(rest))
    return merged


def _stretches(picks: list[Pick]) -> list[list[Pick]]:
    number = max(1, min(_STRETCHES, len(picks) // _LEAST_ROWS))
    bounds = [0, *accumulate(largest_remainder([Fraction(1, number)] * number, len(picks)))]
    return [picks[start:end] for start, end in pairwise(bounds)]


def _exact(value: float) -> Fraction:
    """Returns the decimal number that was written: 0.05 is 1/20, not the nearest binary fraction."""
    return Fraction(str(value))


# ------------------------------------------------------------------ what will really be trained on


def mixture_table(order: list[list[Pick]], facts: dict[str, list[tuple[int, int, float]]]) -> str:
    """Returns a table of rows, tokens and supervised tokens of the whole run, their shares, and repeats, per source.

    facts: maps a source to (tokens, supervised tokens, weight of the loss) of each document. The column ``loss`` is the
    share of the loss that its documents have, which is what moves the model.
    """
    sums = {name: [0, 0, 0, 0.0] for name in facts}
    for picks in order:
        for name, index in picks:
            for column, value in enumerate((1, *facts[name][index])):
                sums[name][column] += value
    totals = [sum(column) or 1 for column in zip(*sums.values(), strict=True)]
    head = f"{'source':<16}{'rows':>18}{'tokens':>22}{'supervised':>22}{'loss':>8}{'repeats':>9}"
    lines = [head]
    for name, row in sums.items():
        cells = [f"{value:,} ({value / total:.1%})" for value, total in zip(row[:3], totals[:3], strict=True)]
        repeats = row[0] / len(facts[name]) if facts[name] else 0.0
        lines.append(f"{name:<16}{cells[0]:>18}{cells[1]:>22}{cells[2]:>22}{row[3] / totals[3]:>8.1%}{repeats:>8.2f}x")
    return "\n".join(lines)
