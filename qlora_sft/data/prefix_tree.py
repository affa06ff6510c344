"""Build the tree of the prefixes that rows share: what stands at the beginning of several rows is in it once.

A hidden state depends on the tokens before it and on nothing else, and the loss is a weighted sum over tokens. So rows
that begin alike can be computed together, exactly: every segment of the tree once, attending to the segments above it
and causally to itself::

    row 0   S S S S a a        segment 0   S S S S     parent none
    row 1   S S S S b b b      segment 1   a a         parent 0
                               segment 2   b b b       parent 0

Prefixes are shared in whole blocks of `BLOCK` tokens, so that a few equal tokens make no segment of their own. The
tree of several sets of rows is never larger than the trees of these sets together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BLOCK = 16

Tokens = NDArray[np.int32]

# Odd factors without a pattern: the powers of an odd number modulo 2^64.
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(1, BLOCK + 1)], dtype=np.uint64)


@dataclass
class Segment:
    """Marks a run of tokens in the tree: tokens [start, end) of row number ``row``."""

    row: int
    start: int
    end: int
    parent: int
    """Number of the segment above it; -1 for one that begins its rows."""

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PrefixTree:
    """Holds the segments of a tree and the path of every row through them.

    Segments stand depth first: each behind its parent and before its parent's next child.
    """

    segments: list[Segment]
    paths: list[list[int]]
    """For every row, in the order in which they were given, the numbers of its segments from the first to the last."""

    @property
    def parents(self) -> tuple[int, ...]:
        return tuple(segment.parent for segment in self.segments)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(segment) for segment in self.segments)


def shared_length(a: Tokens, b: Tokens) -> int:
    """Returns how many tokens at the beginning of ``a`` and ``b`` are shared: those that are equal, in whole blocks."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    equal = int(different[0]) if len(different) else length
    return equal // BLOCK * BLOCK


def order_key(tokens: Tokens) -> bytes:
    """Returns bytes by which rows are sorted so that those that begin with the same blocks become neighbours.

    They are a hash of every whole block. Two different blocks with one hash cost a little sharing and nothing else.
    """
    whole = len(tokens) // BLOCK * BLOCK
    hashes = tokens[:whole].astype(np.uint64).reshape(-1, BLOCK) @ _FACTORS
    return (hashes ^ (hashes >> np.uint64(29))).astype(">u8").tobytes()


def tree_tokens(rows: Sequence[Tokens]) -> int:
    """Returns how many tokens the tree of ``rows`` has."""
    ordered = sorted(rows, key=order_key)
    shared = sum(shared_length(a, b) for a, b in pairwise(ordered))
    return sum(map(len, ordered)) - shared


def prefix_tree(rows: Sequence[Tokens]) -> PrefixTree:
    """Returns the tree of ``rows``, each int32 [T] with at least one token."""
    order = sorted(range(len(rows)), key=lambda row: order_key(rows[row]))
    found: list[Segment] = []
    leaf_of: dict[int, int] = {}
    path: list[int] = []
    for number, row in enumerate(order):
        shared = shared_length(rows[order[number - 1]], rows[row]) if number else 0
        path = _branch(found, path, shared)
        if shared < len(rows[row]):
            found.append(Segment(row, shared, len(rows[row]), path[-1] if path else -1))
            path.append(len(found) - 1)
        leaf_of[row] = path[-1]
    numbers = {old: new for new, old in enumerate(_depth_first(found))}
    segments = [found[old] for old in numbers]
    for segment in segments:
        segment.parent = numbers.get(segment.parent, -1)
    return PrefixTree(segments, [_path(segments, numbers[leaf_of[row]]) for row in range(len(rows))])


def _branch(found: list[Segment], path: list[int], depth: int) -> list[int]:
    """Returns the part of ``path`` up to ``depth``; a segment that reaches further is cut there in two."""
    kept = [number for number in path if found[number].end <= depth]
    if len(kept) == len(path):
        return kept
    cut = found[path[len(kept)]]
    if cut.start >= depth:
        return kept
    upper = Segment(cut.row, cut.start, depth, cut.parent)
    found.append(upper)
    cut.start, cut.parent = depth, len(found) - 1
    return [*kept, len(found) - 1]


def _depth_first(segments: list[Segment]) -> Iterator[int]:
    """Yields the numbers of the segments, every one behind its parent and before its parent's next child."""
    children: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        children.setdefault(segment.parent, []).append(number)
    waiting = children.get(-1, [])[::-1]
    while waiting:
        number = waiting.pop()
        yield number
        waiting += children.get(number, [])[::-1]


def _path(segments: list[Segment], leaf: int) -> list[int]:
    path = []
    while leaf >= 0:
        path.append(leaf)
        leaf = segments[leaf].parent
    return path[::-1]
