"""Knows the lengths of what document bounds separate, and cuts a packed sequence into the parts that attend alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qlora_sft.model.attention_tree import Tree, tree_of

# All layers of a forward, and of its recomputation, come with the same tensor of bounds.
_lengths: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember_lengths(bounds: Tensor, lengths: Sequence[int]) -> None:
    """Tells attention the lengths of the documents that ``bounds`` separates, so that it need not ask the GPU."""
    _lengths[bounds] = list(lengths)


def lengths_of(bounds: Tensor) -> list[int]:
    """Returns the tokens of every document: what was remembered, or what the device says, for which the host waits."""
    if bounds not in _lengths:
        _lengths[bounds] = (bounds[1:] - bounds[:-1]).tolist()
    found: list[int] = _lengths[bounds]
    return found


# Maps the bounds of documents, and then the size of chunks, to the bounds of the chunks, which are the same for all
# layers of a forward.
_chunked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def chunked(bounds: Tensor, chunk: int) -> Tensor:
    """Returns the bounds of the chunks of every document, counted from where it begins."""
    made: dict[int, Tensor] = _chunked.setdefault(bounds, {})
    if chunk not in made:
        pieces = [min(chunk, length - at) for length in lengths_of(bounds) for at in range(0, length, chunk)]
        made[chunk] = torch.tensor([0, *accumulate(pieces)], dtype=bounds.dtype).to(bounds.device)
        remember_lengths(made[chunk], pieces)
    return made[chunk]


def parts_of(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields queries with the keys and values that they see, all [1, heads, tokens, d], in the order of the sequence.

    The last query sees the last key, the one before it all but the last, and so on. A part is a document, or a segment
    of a tree with what stands before it in its rows, as far as a ``window`` reaches. So keys of a prefix are copied for
    every segment behind it, as they are where every row is computed.
    """
    # The tensors are split at once and not sliced document by document. The gradient of a slice is as large as all of
    # its tensor, so the cost would grow with the square of the number of documents.
    queries, keys, values = (x.split(lengths_of(bounds), dim=2) for x in (query, key, value))
    tree = tree_of(bounds)
    for number, own in enumerate(queries):
        if tree is None:
            yield own, keys[number], values[number]
        else:
            yield own, *(_seen(each, tree, number, window) for each in (keys, values))


def _seen(pieces: Sequence[Tensor], tree: Tree, number: int, window: int | None) -> Tensor:
    """Joins segment ``number`` with the ends of the segments above it that its first token sees."""
    found = [pieces[number]]
    left = tree.starts[number] if window is None else min(tree.starts[number], window - 1)
    while left > 0:
        number = tree.parents[number]
        found.insert(0, pieces[number][:, :, -left:])
        left -= found[0].shape[2]
    return torch.cat(found, dim=2) if len(found) > 1 else found[0]
