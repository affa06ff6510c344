"""Which rows of the hidden states are scored, against which token, and in which document."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_kernels.packed_ce.backend import Requested, choose_path


@dataclass(frozen=True)
class Targets:
    """The supervised rows of one packed sequence of T tokens, in ascending order.

    Row ``t`` predicts token ``t + 1``. It is supervised iff token ``t + 1`` exists, is labelled and belongs to
    the same document, so the shift, the mask and the document boundary are resolved here, once::

        tokens    a0 a1 a2 | b0 b1      labels   -  a1 a2 | b0 b1
        rows       0  1        3        ids      a1 a2      b1       (b0 starts a document: nothing predicts it)

    rows: int32 [M] positions; ids: int32 [M] target tokens; docs: int32 [M] document of each row;
    n_documents: how many documents the sequence holds, those without a supervised row included. docs ascends.
    row_range, id_range: lowest and highest of rows and ids where the host knows them.
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
    def from_host(
        cls,
        rows: Tensor,
        ids: Tensor,
        docs: Tensor,
        n_documents: int,
        *,
        row_range: tuple[int, int] | None = None,
        id_range: tuple[int, int] | None = None,
    ) -> Targets:
        """From tensors that a data loader prepared; asks the device nothing. Shapes are checked.

        row_range, id_range: (lowest, highest) as the host knows them, so that wrong ones can be refused without
        asking; found here if the tensors are still on the CPU.
        """
        for name, tensor in (("rows", rows), ("ids", ids), ("docs", docs)):
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: expected int32 [M], got {tensor.dtype} {list(tensor.shape)}")
            if tensor.numel() != rows.numel():
                raise ValueError(f"{name} has {tensor.numel()} entries but rows has {rows.numel()}")
        if rows.device.type == "cpu" and rows.numel():
            row_range, id_range = row_range or _range(rows), id_range or _range(ids)
            _check_documents(docs, n_documents)
        return cls(rows, ids, docs, n_documents, row_range, id_range)

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on ``device``; what the host knows about them is kept."""
        rows, ids, docs = (t.to(device, non_blocking=True) for t in (self.rows, self.ids, self.docs))
        return replace(self, rows=rows, ids=ids, docs=docs)

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        ignore_index: int = -100,
        *,
        position_ids: Tensor | None = None,
        n_supervised: int | None = None,
        path: Requested = "auto",
    ) -> Targets:
        """From labels int [T] aligned with the tokens (not shifted), and the documents.

        cu_seqlens: bounds int [D + 1], from 0 to T; or position_ids: int [T], 0 where a document starts.
        n_supervised: the number of rows, if the host knows it: with it and cu_seqlens a GPU is asked nothing.
        """
        if labels.dim() != 1 or labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels: expected int [T], got {labels.dtype} {list(labels.shape)}")
        docs, n_documents = _documents(labels, cu_seqlens, position_ids)
        if choose_path(path, labels.device).name == "triton" and labels.numel():
            from qlora_kernels.packed_ce.select import select_rows

            rows, ids, row_docs = select_rows(labels.contiguous(), docs, ignore_index, n_supervised)
        else:
            rows, ids, row_docs = _select_in_torch(labels, docs, ignore_index)
        if n_supervised is not None and n_supervised != len(rows):
            raise ValueError(f"n_supervised: {n_supervised}, but the labels have {len(rows)}")
        return cls(rows, ids, row_docs, n_documents)


def _select_in_torch(labels: Tensor, docs: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    kept = (labels[1:] != ignore_index) & (docs[1:] == docs[:-1])
    rows = kept.nonzero().squeeze(1)
    return rows.int(), labels[rows + 1].int(), docs[rows]


def _documents(labels: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor, int]:
    """(document of each token int32 [T], number of documents)."""
    if (cu_seqlens is None) == (position_ids is None):
        raise ValueError("expected one of cu_seqlens and position_ids")
    if position_ids is not None:
        if position_ids.shape != labels.shape:
            raise ValueError(f"position_ids: expected {list(labels.shape)}, got {list(position_ids.shape)}")
        docs = (position_ids == 0).cumsum(0, dtype=torch.int32) - 1
        return docs, int(docs[-1]) + 1 if len(docs) else 0
    assert cu_seqlens is not None
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != labels.numel() or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens must run from 0 to T={labels.numel()} for labels [T], got {bounds}")
    tokens = torch.arange(labels.numel(), device=labels.device, dtype=torch.int32)
    docs = torch.searchsorted(cu_seqlens.to(labels.device, torch.int32), tokens, right=True, out_int32=True) - 1
    return docs, cu_seqlens.numel() - 1


def _range(values: Tensor) -> tuple[int, int]:
    return int(values.min()), int(values.max())


def _check_documents(docs: Tensor, n_documents: int) -> None:
    if int(docs[0]) < 0 or int(docs[-1]) >= n_documents or bool((docs[1:] < docs[:-1]).any()):
        raise ValueError(f"docs: expected 0 to {n_documents - 1} in ascending order, got {docs.tolist()[:20]}")
