"""Which rows of the hidden states are scored, against which token, and in which document."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The supervised rows of one packed sequence of T tokens, in ascending order.

    Row ``t`` predicts token ``t + 1``. It is supervised iff token ``t + 1`` exists, is labelled and belongs to
    the same document, so the shift, the mask and the document boundary are resolved here, once::

        tokens    a0 a1 a2 | b0 b1      labels   -  a1 a2 | b0 b1
        rows       0  1        3        ids      a1 a2      b1       (b0 starts a document: nothing predicts it)

    rows: int32 [M] positions; ids: int32 [M] target tokens; docs: int32 [M] document of each row;
    n_documents: how many documents the sequence holds, those without a supervised row included.
    """

    rows: Tensor
    ids: Tensor
    docs: Tensor
    n_documents: int
    row_range: tuple[int, int] | None = None
    id_range: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.rows.numel()

    @classmethod
    def from_host(cls, rows: Tensor, ids: Tensor, docs: Tensor, n_documents: int) -> Targets:
        """From tensors that a data loader prepared; asks the device nothing. Shapes are checked."""
        for name, tensor in (("rows", rows), ("ids", ids), ("docs", docs)):
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: expected int32 [M], got {tensor.dtype} {list(tensor.shape)}")
            if tensor.numel() != rows.numel():
                raise ValueError(f"{name} has {tensor.numel()} entries but rows has {rows.numel()}")
        return cls(rows, ids, docs, n_documents)

    @classmethod
    def from_labels(cls, labels: Tensor, cu_seqlens: Tensor, ignore_index: int = -100) -> Targets:
        """From labels int [T] aligned with the tokens (not shifted) and document bounds int [D + 1]."""
        bounds = cu_seqlens.tolist()
        if labels.dim() != 1 or not bounds or bounds[0] != 0 or bounds[-1] != labels.numel():
            raise ValueError(f"cu_seqlens must run from 0 to T={labels.numel()} for labels [T], got {bounds}")
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        document = torch.repeat_interleave(torch.arange(len(bounds) - 1, device=labels.device), lengths)
        kept = (labels[1:] != ignore_index) & (document[1:] == document[:-1])
        rows = kept.nonzero().squeeze(1)
        return cls(rows.int(), labels[rows + 1].int(), document[rows].int(), len(bounds) - 1)
