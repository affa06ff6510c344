"""Flatten documents into one micro-batch, and work out on the host whatever the device must know."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_sft.data.render import Rendered


class Batch(TypedDict):
    """Holds one micro-batch: D documents one after the other, T tokens in all, M of them supervised.

    The hidden state at position ``t`` predicts token ``t + 1``; only pairs inside one document count.
    """

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """int64 [1, T], from 0 in each document"""
    cu_seqlens: Tensor
    """int32 [D + 1], document bounds"""
    positions: Tensor
    """int32 [M], positions whose next token is supervised"""
    targets: Tensor
    """int32 [M], those next tokens"""
    position_weights: Tensor
    """float32 [M]"""
    position_counts: Tensor
    """float32 [M], in how many documents each is supervised: 1, but where documents share a prefix"""
    position_documents: Tensor
    """int32 [M], document of each position; 0 for all where documents share prefixes"""
    position_sources: Tensor
    """int32 [M], the source of each position, as a number into ``sources``; of the first document that supervises it
    where documents share prefixes"""
    sources: tuple[str, ...]
    """Names of the sources that have a supervised position here"""
    source_weights: tuple[float, ...]
    """Sum of the position weights of each"""
    n_supervised: int
    """Supervised tokens of the documents: M, or more where documents share prefixes"""
    weight_sum: float
    """Sum of the position weights, which is this micro-batch's part of the divisor of the loss"""
    longest: int
    """Tokens of the longest document"""
    lengths: tuple[int, ...]
    """Tokens of each document, as ``cu_seqlens`` says as well; on the host they can be
    read without waiting for the device"""
    parents: tuple[int, ...] | None
    """None, or what is between the bounds are the segments of a tree (`qlora_sft.data.prefix_tree`): the number of the
    segment above each, -1 for none"""
    repeated: Tensor
    """int64 [R], positions that predict a token of another branch as well: their hidden states stand behind the T
    others as number T to T + R - 1"""
    replayed: NotRequired[Replayed]
    """The documents of replay, where they are held to the base's answers"""


class Replayed(TypedDict):
    """Holds the documents of replay of a micro-batch by themselves: the base reads nothing else."""

    documents: Batch
    places: Tensor
    """int64, where the supervised positions of ``documents`` are in the whole micro-batch"""


def flatten(documents: Sequence[Rendered]) -> Batch:
    """Returns the documents of one or more packed sequences as one micro-batch. Nothing is padded."""
    ids: list[int] = []
    position_ids: list[int] = []
    bounds = [0]
    positions: list[int] = []
    weights: list[float] = []
    position_documents: list[int] = []
    for number, document in enumerate(documents):
        start = bounds[-1]
        length = len(document.input_ids)
        ids += document.input_ids
        position_ids += range(length)
        bounds.append(start + length)
        # The first token of a document is predicted by nothing, whatever its label says.
        for i in range(1, length):
            if document.weights[i] > 0:
                positions.append(start + i - 1)
                weights.append(document.weights[i])
                position_documents.append(number)
    names = [document.source for document in documents]
    sources = sources_of(names, np.asarray(position_documents, dtype=np.int64), np.asarray(weights))
    return Batch(
        input_ids=torch.tensor([ids], dtype=torch.int64),
        position_ids=torch.tensor([position_ids], dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        targets=torch.tensor([ids[position + 1] for position in positions], dtype=torch.int32),
        position_weights=torch.tensor(weights, dtype=torch.float32),
        position_counts=torch.ones(len(positions)),
        position_documents=torch.tensor(position_documents, dtype=torch.int32),
        position_sources=sources.of_positions,
        sources=sources.names,
        source_weights=sources.weights,
        n_supervised=len(positions),
        weight_sum=sum(weights),
        longest=max((b - a for a, b in pairwise(bounds)), default=0),
        lengths=tuple(b - a for a, b in pairwise(bounds)),
        parents=None,
        repeated=torch.zeros(0, dtype=torch.int64),
    )


def replayed_of(documents: list[Rendered], replay: str) -> Replayed | None:
    """Returns the documents of the source ``replay`` in a micro-batch; None if nothing in them is supervised."""
    starts = np.cumsum([0, *(len(document.input_ids) for document in documents)])
    own = [number for number, document in enumerate(documents) if document.source == replay]
    alone = flatten([documents[number] for number in own])
    if not alone["n_supervised"]:
        return None
    moved = torch.tensor([int(starts[number]) for number in own]) - alone["cu_seqlens"][:-1]
    places = alone["positions"] + moved[alone["position_documents"].long()]
    return Replayed(documents=alone, places=places.long())


class BatchSources(NamedTuple):
    """Holds the sources of the supervised positions of a micro-batch."""

    of_positions: Tensor
    names: tuple[str, ...]
    weights: tuple[float, ...]


def sources_of(names: Sequence[str], documents: NDArray[np.int64], weights: NDArray[np.float64]) -> BatchSources:
    """Returns the sources of positions, in the order in which they occur.

    names: the source of every document. documents, weights: document and weight of every position.
    """
    numbers: dict[str, int] = {}
    occurring = dict.fromkeys(documents.tolist())
    of_document = {document: numbers.setdefault(names[document], len(numbers)) for document in occurring}
    of_positions = np.array([of_document[document] for document in documents.tolist()], dtype=np.int32)
    sums = np.bincount(of_positions, weights=weights, minlength=len(numbers))
    return BatchSources(torch.from_numpy(of_positions), tuple(numbers), tuple(sums.tolist()))


def longest_micro_batch(tokens: Sequence[int], batch_size: int) -> int:
    """Returns the tokens of the longest micro-batch, which is ``batch_size`` packed sequences in training order.

    tokens: number of tokens that are computed for each sequence.
    """
    return max((sum(tokens[i : i + batch_size]) for i in range(0, len(tokens), batch_size)), default=0)
