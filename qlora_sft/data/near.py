"""Find texts that differ only a little: MinHash over word shingles, and the families of similar texts.

It needs nothing but numpy. The Jaccard similarity of two texts is estimated by the share of equal minima.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Sketch = NDArray[np.uint32]
"""Holds the minima of a text, uint32 [PERMUTATIONS]."""

PERMUTATIONS = 128
# So many minima in a row make a key. Of two texts with similarity s, s^6 share one key, and 1 - (1 - s^6)^21 share any:
# 99.8% at 0.8.
_KEY = 6
_AT_ONCE = 1 << 14
# Members of a bucket that are compared each with each; more are texts of one pattern, and comparing them takes minutes.
_COMPARED = 5000


def sketch(words: Sequence[str], shingle: int) -> Sketch:
    """Returns the sketch of a text from its words; the same words give the same sketch on every machine."""
    codes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words] or [0], dtype=np.uint64)
    length = min(shingle, len(codes))
    hashes = np.zeros(len(codes) - length + 1, dtype=np.uint64)
    for offset in range(length):
        hashes = _mixed(hashes ^ codes[offset : offset + len(hashes)])
    hashes = np.unique(hashes)
    minima = np.full(PERMUTATIONS, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(hashes), _AT_ONCE):
        part = _mixed(hashes[start : start + _AT_ONCE, None] ^ _SEEDS) >> np.uint64(32)
        minima = np.minimum(minima, part.min(axis=0).astype(np.uint32))
    return minima


def similarity(a: Sketch, b: Sketch) -> float:
    """Returns the estimated Jaccard similarity of two texts."""
    return float((a == b).mean())


def families(sketches: NDArray[np.uint32], least: float, joined: Iterable[tuple[int, int]] = ()) -> list[int]:
    """Returns for each text the number of the first text of its family.

    Texts whose similarity is ``least`` or more are of one family, and so are those that a chain of such texts connects.

    sketches: uint32 [N, PERMUTATIONS]. joined: pairs of texts that are of one family however much they differ.
    """
    parents = list(range(len(sketches)))
    for start in range(0, PERMUTATIONS - _KEY + 1, _KEY):
        buckets: dict[bytes, list[int]] = {}
        for number, key in enumerate(np.ascontiguousarray(sketches[:, start : start + _KEY])):
            buckets.setdefault(key.tobytes(), []).append(number)
        for members in buckets.values():
            if len(members) > 1:
                _join(members, sketches, least, parents)
    for one, other in joined:
        a, b = _root(parents, one), _root(parents, other)
        parents[max(a, b)] = min(a, b)
    return [_root(parents, number) for number in range(len(parents))]


def _join(members: list[int], sketches: NDArray[np.uint32], least: float, parents: list[int]) -> None:
    """Joins the families of those members of a bucket that are alike; all of a very large one, unseen.

    ``parents`` is changed.
    """
    own = sketches[members] if len(members) <= _COMPARED else None
    for place, number in enumerate(members[1:], start=1):
        alike = [0] if own is None else np.flatnonzero((own[:place] == own[place]).mean(axis=1) >= least).tolist()
        for other in alike:
            a, b = _root(parents, members[other]), _root(parents, number)
            parents[max(a, b)] = min(a, b)


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns well-mixed 64-bit hashes of 64-bit numbers (splitmix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SEEDS = _mixed(np.arange(1, PERMUTATIONS + 1, dtype=np.uint64))
