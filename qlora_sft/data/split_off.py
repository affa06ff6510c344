"""Hold out a share of the training rows: by seed and content, source by source, near duplicates on one side.

So are the rows of one conversation, where each goes on where another ends.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction

import numpy as np

from qlora_sft.config_data import SourceConfig
from qlora_sft.data.conversation import Conversation
from qlora_sft.data.dedup import SHINGLE, SIMILARITY, content, normalised, words_of
from qlora_sft.data.near import families, sketch
from qlora_sft.data.sources import Source, place
from qlora_sft.errors import DataError
from qlora_sft.say import Say

HELD_OUT = "held out"


@dataclass(frozen=True)
class _Row:
    source: int
    position: int
    key: bytes
    """Hash of seed and content, by which rows are chosen, wherever they stand."""


def split_off(
    sources: list[Source], shares: Mapping[str, Fraction], seed: int, say: Say = lambda _: None
) -> tuple[list[Source], list[Source]]:
    """Returns the sources without the rows that are held out, and a held-out source for each of ``shares``.

    shares: which part of which source is held out: at least one row, and never all.

    Families of near duplicates and of rows that continue one another, in all sources together, are held out whole or
    not at all, and not if a source that has no share has a part in them. Rows whose answer is marked as not wanted are
    neither trained nor held out. Raises `DataError` if nothing of a source can be held out.
    """
    rows, members = _families(sources, seed)
    usable = Counter(row.source for row in rows)
    wanted = {
        number: max(1, round(shares[source.name] * usable[number]))
        for number, source in enumerate(sources)
        if shares.get(source.name)
    }
    taken = _choose(rows, members, {n: min(count, usable[n] - 1) for n, count in wanted.items()})
    left, held_out, problems = [], [], []
    for number, source in enumerate(sources):
        mine = {rows[index].position for family in taken for index in family if rows[index].source == number}
        if number not in wanted:
            left.append(source)
            continue
        if not mine and usable[number] == 0:
            left.append(source)  # nothing to be trained either, which is said once it is rendered
            continue
        if not mine:
            alike = (
                f"its {usable[number]:,} rows are near duplicates or parts of one conversation, among themselves or "
                "with other sources'"
            )
            problems.append(
                f"{source.path}: no row of {source.name!r} can be held out, because "
                f"{alike if usable[number] > 1 else 'it has only one row'}; name held-out data, set held_out: 0% for "
                "this source, or set data.deduplicate=near"
            )
            continue
        say(
            f"{source.name}: {len(mine):,} of {usable[number]:,} rows are held out, chosen by seed and content, "
            f"near duplicates (similarity from {SIMILARITY} on) on one side"
        )
        rest, part = _divided(source, mine)
        left.append(rest)
        held_out.append(part)
    if problems:
        raise DataError("\n".join(problems))
    return left, held_out


def _families(sources: list[Source], seed: int) -> tuple[list[_Row], list[list[int]]]:
    """Returns all rows that can be held out, and the indices of the rows of each family.

    The families are in the order of their least key.
    """
    rows, sketches, answered = [], [], []
    for number, source in enumerate(sources):
        for position, row in enumerate(source.rows):
            if row.get("undesired"):
                continue
            rows.append(_Row(number, position, _key(row, seed)))
            sketches.append(sketch(words_of(row), SHINGLE))
            answered.append(_answered(row))
    found: dict[int, list[int]] = {}
    alike = families(np.stack(sketches), SIMILARITY, _continued(answered)) if sketches else []
    for index, first in enumerate(alike):
        found.setdefault(first, []).append(index)
    return rows, sorted(found.values(), key=lambda family: min(rows[index].key for index in family))


def _answered(row: Conversation) -> list[bytes]:
    """Returns a hash of what has been said at the end of every answer of a row; none for a plain text.

    System prompts and reasoning are left out: logs may have them in the last row of a conversation alone.
    """
    said, found = hashlib.sha256(), []
    for message in row.get("messages", []):
        if message["role"] == "system":
            continue
        calls = [call["function"] for call in message.get("tool_calls", [])]
        each = json.dumps(normalised([message["role"], message["content"], calls]), sort_keys=True)
        said.update(each.encode("utf-8", "surrogatepass"))
        if message["role"] == "assistant":
            found.append(said.digest()[:16])
    return found


def _continued(answered: list[list[bytes]]) -> Iterator[tuple[int, int]]:
    """Yields pairs of rows of which the second goes on where the first ends, as logs of a chat have a row per answer.

    answered: of every row, as `_answered` returns it. What the first one is asked, the second one learns.
    """
    ends: dict[bytes, int] = {}
    for number, digests in enumerate(answered):
        if digests:
            ends.setdefault(digests[-1], number)
    for number, digests in enumerate(answered):
        yield from ((ends[digest], number) for digest in digests[:-1] if digest in ends)


def _key(row: Conversation, seed: int) -> bytes:
    text = json.dumps([seed, normalised(content(row))], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _choose(rows: list[_Row], members: list[list[int]], wanted: dict[int, int]) -> list[list[int]]:
    """Returns the families that are held out: in their order, as long as they fit what is wanted of every source.

    A source of which no family fits gives its smallest one.
    """
    counts = [Counter(rows[index].source for index in family) for family in members]
    left, taken = dict(wanted), []
    for number, count in enumerate(counts):
        if all(n <= left.get(source, 0) for source, n in count.items()):
            taken.append(number)
            left = {source: n - count[source] for source, n in left.items()}
    for source in wanted:
        if not any(counts[number][source] for number in taken):
            taken += _smallest(source, counts, rows, set(wanted), taken)
    return [members[number] for number in taken]


def _smallest(source: int, counts: list[Counter[int]], rows: list[_Row], free: set[int], taken: list[int]) -> list[int]:
    """Returns the number of the smallest family of ``source`` that leaves every source a row, or nothing."""
    used = sum((counts[number] for number in taken), Counter[int]())
    total = Counter(row.source for row in rows)
    fitting = [
        number
        for number, count in enumerate(counts)
        if count[source] and count.keys() <= free and all(used[s] + n < total[s] for s, n in count.items())
    ]
    return sorted(fitting, key=lambda number: counts[number].total())[:1]


def _divided(source: Source, positions: set[int]) -> tuple[Source, Source]:
    """Returns the source without the rows at ``positions``, and a held-out source of those."""
    others = set(range(len(source.rows))) - positions
    part = source.rows.without(others)
    named = {each.name: getattr(source.settings, each.name) for each in fields(SourceConfig)}
    held_out = replace(source, rows=part, read=len(part), settings=SourceConfig(**named), removed={}, split=True)
    places = [place(row) for row in part]
    removed = {**source.removed, HELD_OUT: places}
    return replace(source, rows=source.rows.without(positions), removed=removed), held_out
