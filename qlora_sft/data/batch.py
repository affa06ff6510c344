"""Documents -> one flat row, with everything that the device must know already worked out on the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor

from qlora_sft.data.render import Rendered


class Batch(TypedDict):
    """One micro-batch: D documents behind one another, T tokens in all, M of them supervised.

    Row ``t`` of the hidden states predicts token ``t + 1``; only pairs inside one document count.
    """

    input_ids: Tensor
    """int64 [1, T]"""
    position_ids: Tensor
    """int64 [1, T], from 0 in each document"""
    cu_seqlens: Tensor
    """int32 [D + 1], document bounds"""
    rows: Tensor
    """int32 [M], rows whose next token is supervised"""
    targets: Tensor
    """int32 [M], those next tokens"""
    row_weights: Tensor
    """float32 [M]"""
    row_documents: Tensor
    """int32 [M], document of each row"""
    n_supervised: int
    """M"""
    weight_sum: float
    """Sum of the row weights: this micro-batch's part of the divisor of the loss"""
    longest: int
    """Tokens of the longest document"""
    lengths: tuple[int, ...]
    """Tokens of each document, which ``cu_seqlens`` says as well; on the host, where reading them waits for nothing"""


def flatten(documents: list[Rendered]) -> Batch:
    """The documents of one or more bins as one flat row. Nothing is padded."""
    ids: list[int] = []
    positions: list[int] = []
    bounds = [0]
    rows: list[int] = []
    weights: list[float] = []
    row_documents: list[int] = []
    for number, document in enumerate(documents):
        start = bounds[-1]
        length = len(document.input_ids)
        ids += document.input_ids
        positions += range(length)
        bounds.append(start + length)
        # The first token of a document is predicted by nothing, whatever its label says.
        for i in range(1, length):
            if document.weights[i] > 0:
                rows.append(start + i - 1)
                weights.append(document.weights[i])
                row_documents.append(number)
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        rows=torch.tensor(rows, dtype=torch.int32),
        targets=torch.tensor([ids[row + 1] for row in rows], dtype=torch.int32),
        row_weights=torch.tensor(weights, dtype=torch.float32),
        row_documents=torch.tensor(row_documents, dtype=torch.int32),
        n_supervised=len(rows),
        weight_sum=sum(weights),
        longest=max((b - a for a, b in pairwise(bounds)), default=0),
        lengths=tuple(b - a for a, b in pairwise(bounds)),
    )


def longest_row(tokens: Sequence[int], bins: Sequence[Sequence[int]], batch_size: int) -> int:
    """Tokens of the longest micro-batch: ``batch_size`` bins, in training order, as one row.

    tokens: of each document.
    """
    lengths = [sum(tokens[index] for index in each) for each in bins]
    return max((sum(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size)), default=0)


class BinCollator:
    """``[{"documents": [i, j]}, ...]`` (bins, as the data loader hands them over) -> `Batch`."""

    def __init__(self, documents: Sequence[Rendered]):
        self.documents = documents

    def __call__(self, bins: list[dict[str, list[int]]]) -> Batch:
        return flatten([self.documents[index] for each in bins for index in each["documents"]])
