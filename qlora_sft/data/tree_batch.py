"""Flatten documents that share prefixes into one micro-batch in which every shared segment stands once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_sft.data.batch import Batch, sources_of
from qlora_sft.data.prefix_tree import PrefixTree, Tokens, prefix_tree
from qlora_sft.data.render import Rendered


def flatten_tree(documents: Sequence[Rendered]) -> Batch:
    """Returns the tree of the documents' prefixes as one micro-batch.

    A token that is supervised in several documents gets the sum of their weights, so the loss and its gradients are
    those of the documents alone. Where documents part, one position predicts a token of each branch; the loss takes a
    position once, so the second branch and those after it get a copy of its hidden state behind the others
    (``repeated``).
    """
    rows = [np.asarray(document.input_ids, dtype=np.int32) for document in documents]
    tree = prefix_tree(rows)
    bounds = np.cumsum([0, *tree.lengths])
    ids = np.concatenate([rows[segment.row][segment.start : segment.end] for segment in tree.segments])
    weights, counts, owners = _supervision(documents, tree, bounds)
    supervised = np.flatnonzero(counts)
    positions = _predecessors(tree, bounds)[supervised]
    once = np.ones(len(positions), dtype=bool)
    order = np.argsort(positions, kind="stable")
    once[order[1:]] = positions[order[1:]] != positions[order[:-1]]
    repeated = positions[~once]
    positions[~once] = len(ids) + np.arange(len(repeated))
    # In ascending order, as the loss takes them.
    order = np.argsort(positions, kind="stable")
    positions, supervised = positions[order], supervised[order]
    position_ids = np.concatenate([np.arange(segment.start, segment.end) for segment in tree.segments])
    sources = sources_of([document.source for document in documents], owners[supervised], weights[supervised])
    return Batch(
        input_ids=torch.from_numpy(ids.astype(np.int64))[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        positions=torch.from_numpy(positions.astype(np.int32)),
        targets=torch.from_numpy(ids[supervised].astype(np.int32)),
        position_weights=torch.from_numpy(weights[supervised].astype(np.float32)),
        position_counts=torch.from_numpy(counts[supervised].astype(np.float32)),
        position_documents=torch.zeros(len(positions), dtype=torch.int32),
        position_sources=sources.of_positions,
        sources=sources.names,
        source_weights=sources.weights,
        n_supervised=int(counts.sum()),
        weight_sum=float(weights.sum()),
        longest=max(map(len, rows)),
        lengths=tree.lengths,
        parents=tree.parents,
        repeated=torch.from_numpy(repeated),
    )


def _supervision(
    documents: Sequence[Rendered], tree: PrefixTree, bounds: Tokens
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns, for every token of the tree, the sum of its weights over the documents, how many supervise it, and the
    first of these."""
    weights, counts = np.zeros(bounds[-1]), np.zeros(bounds[-1], dtype=np.int64)
    owners = np.zeros(bounds[-1], dtype=np.int64)
    for index, (document, path) in enumerate(zip(documents, tree.paths, strict=True)):
        own = np.asarray(document.weights, dtype=np.float64)
        own[0] = 0  # The first token of a document is predicted by nothing, whatever its label says.
        for number in path:
            segment = tree.segments[number]
            part = np.maximum(own[segment.start : segment.end], 0)
            here = slice(bounds[number], bounds[number + 1])
            owners[here][(counts[here] == 0) & (part > 0)] = index
            weights[here] += part
            counts[here] += part > 0
    return weights, counts, owners


def _predecessors(tree: PrefixTree, bounds: Tokens) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Returns, for every token of the tree, the position of the token before it; -1 where there is none."""
    before = np.arange(bounds[-1]) - 1
    for number, parent in enumerate(tree.parents):
        before[bounds[number]] = bounds[parent + 1] - 1 if parent >= 0 else -1
    return before
