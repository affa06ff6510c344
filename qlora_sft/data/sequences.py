"""Plan the packed sequences of a run: which documents come, in which order, and which are packed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from qlora_sft.config_data import DataConfig
from qlora_sft.data.documents import Sizes, sizes
from qlora_sft.data.mixture import Pick, mixture_table, plan_order
from qlora_sft.data.packing import pack
from qlora_sft.data.prefix_groups import Group, group_by_prefix
from qlora_sft.data.prefix_tree import Tokens, prefix_tree, tree_tokens
from qlora_sft.data.render import Rendered
from qlora_sft.say import Say

# Share of the tokens that sharing must save before it is chosen: below it, its bookkeeping costs more than it saves.
WORTH = 0.05


class Sharing(NamedTuple):
    """Says whether prefixes that rows share can be computed once, and from which share of the tokens on it pays."""

    obstacle: str | None = None
    """Why they cannot; None if they can."""
    worth: float = WORTH
    reason: str = ""
    """Why they can, where that had to be tried out."""


CAN_SHARE = Sharing()


@dataclass(frozen=True)
class Packed:
    """Holds the packed sequences of the whole run, in training order."""

    sequences: list[list[int]]
    """Indices of the documents of each."""
    tokens: list[int]
    """Tokens that are computed for each: where prefixes are shared, fewer than its documents have."""
    shares_prefixes: bool = False


def plan_sequences(
    documents: Sequence[Rendered],
    config: DataConfig,
    epochs: float,
    seed: int,
    say: Say = lambda _: None,
    sharing: Sharing = CAN_SHARE,
) -> Packed:
    """Returns the packed sequences of the whole run in training order.

    The mixture says which documents come and when (`plan_order`); a document that it repeats is in several sequences.
    Each stretch of its order is packed alone: an epoch, a part of a curriculum, or ``packing_window`` documents of
    those. Its sequences are shuffled, so that sequences hold what the mixture has at that time. The same seed gives the
    same order on every machine.
    """
    of_each = sizes(documents)
    numbers: dict[str, list[int]] = {}
    for index, source in enumerate(of_each.source):
        numbers.setdefault(source, []).append(index)
    order = plan_order({name: len(indices) for name, indices in numbers.items()}, config, epochs, seed)
    say(describe_order(order, of_each, numbers, config, epochs))
    stretches = [
        (number, window)
        for number, picks in enumerate(order)
        for window in _windows([numbers[name][row] for name, row in picks], config.packing_window)
    ]
    planned = _shared(documents, stretches, config, seed, of_each, say, sharing)
    if planned is None:
        singles = [(number, [Group([i], of_each.tokens[i]) for i in window]) for number, window in stretches]
        planned = _packed(singles, config, seed)
    if config.packing != "none":
        say(describe_packing(planned, of_each.tokens, config))
    return planned


def segment_lengths(
    documents: Sequence[Rendered], sequences: Sequence[Sequence[int]], batch_size: int
) -> list[list[int]]:
    """Returns the tokens of every segment of the tree that a micro-batch is, for ``batch_size`` sequences each."""
    found = []
    for start in range(0, len(sequences), batch_size):
        indices = [index for each in sequences[start : start + batch_size] for index in each]
        rows = [np.asarray(documents[i].input_ids, dtype=np.int32) for i in indices]
        found.append(list(prefix_tree(rows).lengths))
    return found


def _shared(
    documents: Sequence[Rendered],
    stretches: list[tuple[int, list[int]]],
    config: DataConfig,
    seed: int,
    of_each: Sizes,
    say: Say,
    sharing: Sharing,
) -> Packed | None:
    """Returns the sequences whose documents share prefixes; None where that is off, impossible or saves too little."""
    if config.packing == "none" or config.share_prefixes == "off":
        return None
    rows: dict[int, Tokens] = {}
    grouped = []
    for number, window in stretches:
        rows |= {i: np.asarray(documents[i].input_ids, dtype=np.int32) for i in window if i not in rows}
        groups = group_by_prefix([rows[i] for i in window], [of_each.source[i] for i in window], config.max_length)
        grouped.append((number, [Group([window[i] for i in g.documents], g.tokens, g.prefix) for g in groups]))
    before = sum(of_each.tokens[i] for _, window in stretches for i in window)
    after = sum(group.tokens for _, groups in grouped for group in groups)
    saved = 1 - after / before if before else 0
    worth = config.share_prefixes == "on" or saved > sharing.worth
    if sharing.obstacle is not None and worth:
        anew = "which are computed anew for every row"
        say(f"prefixes: rows share {saved:.1%} of their tokens, {anew}: {sharing.obstacle}")
    if sharing.obstacle is not None or not worth:
        return None
    planned = _packed(grouped, config, seed)
    exact = [tree_tokens([rows[i] for i in each]) for each in planned.sequences]
    reason = f": {sharing.reason}" if sharing.reason else ""
    say(
        f"prefixes: {before:,} tokens in rows, {sum(exact):,} computed ({before / sum(exact):.2f}x fewer); what rows "
        f"share at their beginning is computed once (data.share_prefixes={config.share_prefixes}{reason})"
    )
    return Packed(planned.sequences, exact, True)


def _packed(stretches: list[tuple[int, list[Group]]], config: DataConfig, seed: int) -> Packed:
    """Packs the groups of every stretch, and shuffles its sequences. Raises ValueError for one that is too long."""
    planned, tokens = [], []
    shuffled = {number: Random(f"bins {seed} {number}") for number, _ in stretches}
    for number, groups in stretches:
        lengths = [group.tokens for group in groups]
        packed = pack(lengths, config.max_length, strategy=config.packing)
        shuffled[number].shuffle(packed)
        planned += [[index for i in each for index in groups[i].documents] for each in packed]
        tokens += [sum(lengths[i] for i in each) for each in packed]
    return Packed(planned, tokens)


def _windows(indices: list[int], size: int | None) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)] if size else [indices]


def describe_order(
    order: list[list[Pick]], of_each: Sizes, numbers: dict[str, list[int]], config: DataConfig, epochs: float
) -> str:
    """Returns the mixture as text: the strategy, and a table of what the run will really train on."""
    facts = {
        name: [(of_each.tokens[i], of_each.supervised[i], of_each.weight[i]) for i in indices]
        for name, indices in numbers.items()
    }
    strategy = config.mixture + (f", T = {config.temperature:g}" if config.temperature else "")
    if config.replay:
        fall = f", falling from {2 * config.replay.share:.1%} to 0" if config.curriculum == "progressive" else ""
        strategy += f"; replay {config.replay.share:.1%} of the rows{fall}"
    return f"mixture ({strategy}; {epochs:g} epochs)\n" + mixture_table(order, facts)


def describe_packing(packed: Packed, tokens: list[int], config: DataConfig) -> str:
    """Returns how many sequences there are and how full they are, as text. ``tokens``: of each document."""
    sequences = packed.sequences
    lengths = [tokens[index] for each in sequences for index in each]
    filled = sum(packed.tokens) / (len(sequences) * config.max_length)
    padded = sum(lengths) / (len(lengths) * max(lengths))
    return (
        f"packing ({config.packing}): {len(lengths):,} documents in {len(sequences):,} packed sequences "
        f"of {config.max_length:,} tokens, {filled:.1%} filled (one padded sequence per document: {padded:.1%})"
    )
