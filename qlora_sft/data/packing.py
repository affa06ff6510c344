"""Choose which documents share a packed sequence: best-fit or first-fit decreasing over the whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Literal

Strategy = Literal["bfd", "ffd", "none"]


def pack(lengths: Sequence[int], capacity: int, *, strategy: Strategy = "bfd") -> list[list[int]]:
    """Returns the indices of the documents of each packed sequence; every document is in exactly one, none is split or
    cut.

    ``bfd`` takes the longest document first and puts it where the fewest tokens stay free. ``ffd`` puts it into the
    first sequence that has space. ``none`` gives each document a sequence of its own, in order. Documents of equal
    length keep their order, so the result depends on the arguments alone.

    Raises ValueError for a document longer than ``capacity`` or without tokens.
    """
    if lengths and not 0 < min(lengths) <= max(lengths) <= capacity:
        index, length = next((i, n) for i, n in enumerate(lengths) if not 0 < n <= capacity)
        raise ValueError(f"document {index} has {length} tokens; a packed sequence holds 1 to {capacity}")
    if strategy == "none":
        return [[index] for index in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups = ((length, list(group)) for length, group in groupby(order, key=lengths.__getitem__))
    return _best_fit(groups, capacity) if strategy == "bfd" else _first_fit(groups, capacity, len(lengths))


def _best_fit(groups: Iterable[tuple[int, list[int]]], capacity: int) -> list[list[int]]:
    """Packs all documents of one length at a time.

    The best fit for the first of them stays the best fit for the next ones until it is full, because what is left in it
    is less than any other space that fits. So a sequence with f free tokens takes f // length of them at once.
    """
    sequences: list[list[int]] = []
    by_free: dict[int, list[int]] = {capacity: []}
    # Bit f is set iff some sequence has exactly f free tokens: the best fit is the lowest bit from `length` on.
    free_sizes = 0
    for length, documents in groups:
        placed = 0
        while placed < len(documents):
            fitting = free_sizes >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                candidates = by_free[free]
            else:
                free, candidates = capacity, [len(sequences)]
                sequences.append([])
            each = free // length
            while candidates and placed < len(documents):
                chosen = candidates.pop()
                some = documents[placed : placed + each]
                placed += len(some)
                sequences[chosen].extend(some)
                left = free - len(some) * length
                if left:
                    by_free.setdefault(left, []).append(chosen)
                    free_sizes |= 1 << left
            if fitting and not candidates:
                free_sizes ^= 1 << free
    return sequences


def _first_fit(groups: Iterable[tuple[int, list[int]]], capacity: int, n_documents: int) -> list[list[int]]:
    """Packs by a tree over the sequences, in their order, whose nodes hold the largest free space below them.

    The first fit is the leftmost path along which that is enough. No more sequences than documents are needed, so all
    start empty.
    """
    leaves = 1 << max(n_documents - 1, 1).bit_length()
    free = [capacity] * (2 * leaves)
    sequences: list[list[int]] = []
    for length, documents in groups:
        for document in documents:
            node = 1
            while node < leaves:
                node *= 2
                if free[node] < length:
                    node += 1
            if node - leaves == len(sequences):
                sequences.append([])
            sequences[node - leaves].append(document)
            free[node] -= length
            while node > 1:
                node //= 2
                free[node] = max(free[2 * node], free[2 * node + 1])
    return sequences
