"""Which documents share a row: best-fit decreasing over the whole data set."""

from __future__ import annotations

from typing import Literal


def pack(lengths: list[int], capacity: int, *, strategy: Literal["bfd", "none"] = "bfd") -> list[list[int]]:
    """Indices of the documents of each bin; every document in exactly one bin, none split or cut.

    ``bfd`` takes the longest document first and puts it where the least room is left over; ``none`` gives each
    document a bin of its own, in order. Documents of equal length stay in their order, so the result depends on
    the arguments alone.

    Raises ValueError for a document longer than ``capacity`` or of no tokens.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"document {index} has {length} tokens; a bin holds 1 to {capacity}")
    if strategy == "none":
        return [[index] for index in range(len(lengths))]
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    # Bit r is set iff some bin has room for exactly r tokens: the best fit is the lowest bit from `length` on.
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            same = by_room[room]
            chosen = same.pop()
            if not same:
                rooms ^= 1 << room
            bins[chosen].append(index)
        else:
            room, chosen = capacity, len(bins)
            bins.append([index])
        left = room - length
        if left:
            by_room.setdefault(left, []).append(chosen)
            rooms |= 1 << left
    return bins
