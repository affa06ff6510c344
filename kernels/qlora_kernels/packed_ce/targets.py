"""Says which positions of the hidden states are scored, against which token, and in which document."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_kernels.packed_ce.backend import Requested, choose_path


@dataclass(frozen=True)
class Targets:
    """Holds the supervised positions of one packed sequence of T tokens, in ascending order.

    Position ``t`` predicts token ``t + 1``. It is supervised iff token ``t + 1`` exists, is labelled and belongs to
    the same document, so the shift, the mask and the document boundary are resolved here, once::

        tokens    a0 a1 a2 | b0 b1      given    -  a1 a2 | b0 b1
        positions  0  1        3        labels      a1 a2      b1       (b0 starts a document: nothing predicts it)

    positions: int32 [M]; labels: int32 [M], the tokens predicted there; documents: int32 [M], the document of each;
    n_documents: how many documents the sequence holds, those without a supervised position included. documents ascends.
    position_range, label_range: lowest and highest of positions and labels where the host knows them.
    """

    positions: Tensor
    labels: Tensor
    documents: Tensor
    n_documents: int
    position_range: tuple[int, int] | None = None
    label_range: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.positions.numel()

    @classmethod
    def from_host(
        cls,
        positions: Tensor,
        labels: Tensor,
        documents: Tensor,
        n_documents: int,
        *,
        position_range: tuple[int, int] | None = None,
        label_range: tuple[int, int] | None = None,
    ) -> Targets:
        """Makes targets of tensors that a data loader prepared. It checks shapes and asks the device nothing.

        position_range, label_range: (lowest, highest) as the host knows them, so that wrong ones can be refused without
        asking the device. They are found here if the tensors are still on the CPU.
        """
        for name, tensor in (("positions", positions), ("labels", labels), ("documents", documents)):
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: expected int32 [M], got {tensor.dtype} {list(tensor.shape)}")
            if tensor.numel() != positions.numel():
                raise ValueError(f"{name} has {tensor.numel()} entries but positions has {positions.numel()}")
        if positions.device.type == "cpu" and positions.numel():
            position_range, label_range = position_range or _range(positions), label_range or _range(labels)
            _check_documents(documents, n_documents)
        return cls(positions, labels, documents, n_documents, position_range, label_range)

    def to(self, device: torch.device | str) -> Targets:
        """Returns the same targets on ``device``, with what the host knows about them."""
        positions, labels, documents = (
            t.to(device, non_blocking=True) for t in (self.positions, self.labels, self.documents)
        )
        return replace(self, positions=positions, labels=labels, documents=documents)

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
        """Makes targets of labels int [T], which are aligned with the tokens (not shifted), and of the documents.

        cu_seqlens: bounds int [D + 1], from 0 to T; or position_ids: int [T], 0 where a document starts.
        n_supervised: the number of supervised positions, if the host knows it: with it and cu_seqlens a GPU is asked
        nothing.
        """
        if labels.dim() != 1 or labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels: expected int [T], got {labels.dtype} {list(labels.shape)}")
        documents, n_documents = _documents(labels, cu_seqlens, position_ids)
        if choose_path(path, labels.device).name == "triton" and labels.numel():
            from qlora_kernels.packed_ce.select import select_positions

            positions, next_tokens, of_document = select_positions(
                labels.contiguous(), documents, ignore_index, n_supervised
            )
        else:
            positions, next_tokens, of_document = _select_in_torch(labels, documents, ignore_index)
        if n_supervised is not None and n_supervised != len(positions):
            raise ValueError(f"n_supervised: {n_supervised}, but the labels have {len(positions)}")
        return cls(positions, next_tokens, of_document, n_documents)


def _select_in_torch(labels: Tensor, documents: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (positions, labels, documents) of the supervised positions."""
    kept = (labels[1:] != ignore_index) & (documents[1:] == documents[:-1])
    positions = kept.nonzero().squeeze(1)
    return positions.int(), labels[positions + 1].int(), documents[positions]


def _documents(labels: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor, int]:
    """Returns (document of each token int32 [T], number of documents)."""
    if (cu_seqlens is None) == (position_ids is None):
        raise ValueError("expected one of cu_seqlens and position_ids")
    if position_ids is not None:
        if position_ids.shape != labels.shape:
            raise ValueError(f"position_ids: expected {list(labels.shape)}, got {list(position_ids.shape)}")
        documents = (position_ids == 0).cumsum(0, dtype=torch.int32) - 1
        return documents, int(documents[-1]) + 1 if len(documents) else 0
    assert cu_seqlens is not None
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != labels.numel() or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens must run from 0 to T={labels.numel()} for labels [T], got {bounds}")
    tokens = torch.arange(labels.numel(), device=labels.device, dtype=torch.int32)
    documents = torch.searchsorted(cu_seqlens.to(labels.device, torch.int32), tokens, right=True, out_int32=True) - 1
    return documents, cu_seqlens.numel() - 1


def _range(values: Tensor) -> tuple[int, int]:
    return int(values.min()), int(values.max())


def _check_documents(documents: Tensor, n_documents: int) -> None:
    if int(documents[0]) < 0 or int(documents[-1]) >= n_documents or bool((documents[1:] < documents[:-1]).any()):
        raise ValueError(
            f"documents: expected 0 to {n_documents - 1} in ascending order, got {documents.tolist()[:20]}"
        )
