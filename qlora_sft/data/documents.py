"""Keep rendered documents on disk: write them as they come, then map them into memory and read them one by one.

A token in Python lists takes some 40 bytes, so a data set of a gigabyte would take tens of them. Here a token takes 12
bytes on disk, and the system keeps in memory as much of the file as it has space for.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import IO, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from qlora_sft.cache import scratch_file
from qlora_sft.data.render import Rendered

Number = TypeVar("Number", bound=np.generic)
# Documents whose weights are looked at together.
_AT_ONCE = 4096


class _Numbered(Sequence[Rendered]):
    """Adds indices, negative ones and slices included, to a class that has ``at``."""

    @abstractmethod
    def at(self, number: int) -> Rendered:
        """Returns the document at ``number``, which is in range."""

    @overload
    def __getitem__(self, index: int) -> Rendered: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rendered]: ...
    def __getitem__(self, index: int | slice) -> Rendered | list[Rendered]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.at(range(len(self))[index])


class Documents(_Numbered):
    """Holds the documents of one source.

    ids int32 [T] and weights float64 [T] of all documents one after the other (usually memory-mapped), bounds int64 [D
    + 1].
    """

    def __init__(self, source: str, ids: NDArray[np.int32], weights: NDArray[np.float64], bounds: NDArray[np.int64]):
        self.source = source
        self.ids, self.weights, self.bounds = ids, weights, bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def at(self, number: int) -> Rendered:
        part = slice(int(self.bounds[number]), int(self.bounds[number + 1]))
        return Rendered(self.ids[part].tolist(), self.weights[part].tolist(), self.source)


class Chain(_Numbered):
    """Joins the documents of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Sequence[Rendered]]):
        self.parts = [part for part in parts if len(part)]
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def at(self, number: int) -> Rendered:
        part = bisect_right(self.ends, number)
        return self.parts[part][number - (self.ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Rendered]:
        for part in self.parts:
            yield from part


class Writer:
    """Takes the documents of one source as they are rendered, and returns them as `Documents`.

    The files are deleted when nothing refers to the documents any more.
    """

    def __init__(self, source: str):
        self.source = source
        self.bounds = array("q", [0])
        self._ids, self._weights = scratch_file(), scratch_file()

    def add(self, document: Rendered) -> None:
        array("i", document.input_ids).tofile(self._ids)
        array("d", document.weights).tofile(self._weights)
        self.bounds.append(self.bounds[-1] + len(document.input_ids))

    def finish(self) -> Documents:
        return Documents(
            self.source,
            _mapped(self._ids, np.dtype(np.int32)),
            _mapped(self._weights, np.dtype(np.float64)),
            np.array(self.bounds, dtype=np.int64),
        )


@dataclass(frozen=True)
class Sizes:
    """Holds source, tokens, supervised tokens and sum of weights of each document."""

    source: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)


def sizes(documents: Sequence[Rendered]) -> Sizes:
    """Returns the sizes of all documents, in one pass that has a part of them in memory at a time."""
    result = Sizes()
    for part in documents.parts if isinstance(documents, Chain) else [documents]:
        if isinstance(part, Documents):
            _add_mapped(part, result)
            continue
        for document in part:
            result.source.append(document.source)
            result.tokens.append(len(document.input_ids))
            result.supervised.append(document.n_supervised)
            result.weight.append(sum(document.weights))
    return result


def answer_counts(documents: Documents, few: int) -> tuple[int, int]:
    """Returns how many stretches of supervised tokens there are, and how many of them have fewer than ``few`` tokens
    beside the one that ends the turn."""
    answers = short = 0
    for start in range(0, len(documents), _AT_ONCE):
        bounds = documents.bounds[start : start + _AT_ONCE + 1]
        supervised = np.asarray(documents.weights[bounds[0] : bounds[-1]]) > 0
        begins = supervised & ~np.concatenate(([False], supervised[:-1]))
        # A document may begin with the token on which the one before it ends.
        starts = bounds[:-1][np.diff(bounds) > 0] - bounds[0]
        begins[starts] = supervised[starts]
        lengths = np.bincount(np.cumsum(begins)[supervised])[1:]
        answers += len(lengths)
        short += int((lengths - 1 < few).sum())
    return answers, short


def _add_mapped(part: Documents, result: Sizes) -> None:
    result.source.extend([part.source] * len(part))
    result.tokens.extend(np.diff(part.bounds).tolist())
    for start in range(0, len(part), _AT_ONCE):
        bounds = part.bounds[start : start + _AT_ONCE + 1]
        weights = part.weights[bounds[0] : bounds[-1]]
        # Differences of running sums, which are right for a document without tokens as well.
        for values, column in ((weights > 0, result.supervised), (weights, result.weight)):
            running = np.concatenate(([0], np.cumsum(values)))
            column.extend(np.diff(running[bounds - bounds[0]]).tolist())


def _mapped(file: IO[bytes], dtype: np.dtype[Number]) -> NDArray[Number]:
    """Returns the numbers in a nameless file, mapped; the file is deleted when nothing refers to them any more."""
    file.flush()
    # An empty file cannot be mapped.
    return np.memmap(file, dtype, mode="r") if file.tell() else np.empty(0, dtype)
