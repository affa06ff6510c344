"""Choose which rows are packed together, so that the prefixes they share meet in one packed sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_sft.data.prefix_tree import Tokens, order_key, shared_length

# A group takes at most the share of a packed sequence that its source has of the tokens, and at least this one, so that
# the rest holds what else the mixture has at that time. Where the prefix itself is that long, it may take so much that
# the prefix is no more than this share of the group.
SHARE = 0.25


@dataclass
class Group:
    """Holds documents that share a prefix, or a single one that shares none, and how many tokens their tree has."""

    documents: list[int]
    tokens: int
    prefix: int = 0
    """Tokens that all of them share."""


def group_by_prefix(rows: Sequence[Tokens], sources: Sequence[str], capacity: int) -> list[Group]:
    """Returns groups of the indices of ``rows``, none of whose trees is larger than ``capacity``.

    sources: the source of every row.

    Rows are taken in an order in which those that begin alike are neighbours; every row joins the
    group of the one before it, if they share a prefix and the group has room.
    """
    order = sorted(range(len(rows)), key=lambda index: order_key(rows[index]))
    total = Counter[str]()
    for row, source in zip(rows, sources, strict=True):
        total[source] += len(row)
    groups: list[Group] = []
    for number, index in enumerate(order):
        length = len(rows[index])
        shared = shared_length(rows[order[number - 1]], rows[index]) if number else 0
        if shared:
            group = groups[-1]
            prefix = min(group.prefix, shared) if len(group.documents) > 1 else shared
            if group.tokens + length - shared <= _room(prefix, total[sources[index]] / total.total(), capacity):
                group.documents.append(index)
                group.tokens += length - shared
                group.prefix = prefix
                continue
        groups.append(Group([index], length))
    return groups


def _room(prefix: int, share: float, capacity: int) -> int:
    """Returns how many tokens a group may have. share: that of its source in all tokens."""
    return min(capacity, max(int(max(share, SHARE) * capacity), int(prefix / SHARE)))
