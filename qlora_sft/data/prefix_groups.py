"""Which rows are packed together so that the prefixes they share meet in one packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_sft.data.prefix_tree import Tokens, order_key, shared_length

# A group takes at most this share of a packed sequence, so that the rest holds what else the mixture has at that time;
# or, where the prefix itself is that long, so much that the prefix is no more than this share of the group.
SHARE = 0.25


@dataclass
class Group:
    """Documents that share a prefix, or one that shares none, and the tokens of their tree."""

    documents: list[int]
    tokens: int
    prefix: int = 0
    """Tokens that all of them share."""


def group_by_prefix(rows: Sequence[Tokens], capacity: int) -> list[Group]:
    """Returns groups of the indices of ``rows``, none of whose trees is larger than ``capacity``.

    Rows are taken in an order in which those that begin alike are neighbours; every row joins the
    group of the one before it, if they share a prefix and the group has room.
    """
    order = sorted(range(len(rows)), key=lambda index: order_key(rows[index]))
    groups: list[Group] = []
    for number, index in enumerate(order):
        length = len(rows[index])
        shared = shared_length(rows[order[number - 1]], rows[index]) if number else 0
        if shared:
            group = groups[-1]
            prefix = min(group.prefix, shared) if len(group.documents) > 1 else shared
            if group.tokens + length - shared <= _room(prefix, capacity):
                group.documents.append(index)
                group.tokens += length - shared
                group.prefix = prefix
                continue
        groups.append(Group([index], length))
    return groups


def _room(prefix: int, capacity: int) -> int:
    return min(capacity, max(int(SHARE * capacity), int(prefix / SHARE)))
