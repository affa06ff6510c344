"""Which documents share a row: best-fit or first-fit decreasing over the whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Literal

Strategy = Literal["bfd", "ffd", "none"]


def pack(lengths: Sequence[int], capacity: int, *, strategy: Strategy = "bfd") -> list[list[int]]:
    """Indices of the documents of each bin; every document in exactly one bin, none split or cut.

    ``bfd`` takes the longest document first and puts it where the least room is left over, ``ffd`` into the first
    bin that has room; ``none`` gives each document a bin of its own, in order. Documents of equal length stay in
    their order, so the result depends on the arguments alone.

    Raises ValueError for a document longer than ``capacity`` or of no tokens.
    """
    if lengths and not 0 < min(lengths) <= max(lengths) <= capacity:
        index, length = next((i, n) for i, n in enumerate(lengths) if not 0 < n <= capacity)
        raise ValueError(f"document {index} has {length} tokens; a bin holds 1 to {capacity}")
    if strategy == "none":
        return [[index] for index in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups = ((length, list(group)) for length, group in groupby(order, key=lengths.__getitem__))
    return _best_fit(groups, capacity) if strategy == "bfd" else _first_fit(groups, capacity, len(lengths))


def _best_fit(groups: Iterable[tuple[int, list[int]]], capacity: int) -> list[list[int]]:
    """All documents of one length at a time.

    The best fit for the first of them stays the best fit for the next ones until it is full, because what is left
    in it is less than any other fitting room; so a bin with room r takes r // length of them at once.
    """
    sequences: list[list[int]] = []
    by_room: dict[int, list[int]] = {capacity: []}
    # Bit r is set iff some bin has room for exactly r tokens: the best fit is the lowest bit from `length` on.
    rooms = 0
    for length, documents in groups:
        placed = 0
        while placed < len(documents):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                candidates = by_room[room]
            else:
                room, candidates = capacity, [len(sequences)]
                sequences.append([])
            each = room // length
            while candidates and placed < len(documents):
                chosen = candidates.pop()
                some = documents[placed : placed + each]
                placed += len(some)
                sequences[chosen].extend(some)
                left = room - len(some) * length
                if left:
                    by_room.setdefault(left, []).append(chosen)
                    rooms |= 1 << left
            if fitting and not candidates:
                rooms ^= 1 << room
    return sequences


def _first_fit(groups: Iterable[tuple[int, list[int]]], capacity: int, n_documents: int) -> list[list[int]]:
    """A tree over the sequences, in their order, whose nodes hold the largest room below them: the first fit is the
    leftmost path along which that is enough. No more sequences than documents are needed, so all start empty."""
    leaves = 1 << max(n_documents - 1, 1).bit_length()
    room = [capacity] * (2 * leaves)
    sequences: list[list[int]] = []
    for length, documents in groups:
        for document in documents:
            node = 1
            while node < leaves:
                node *= 2
                if room[node] < length:
                    node += 1
            if node - leaves == len(sequences):
                sequences.append([])
            sequences[node - leaves].append(document)
            room[node] -= length
            while node > 1:
                node //= 2
                room[node] = max(room[2 * node], room[2 * node + 1])
    return sequences
