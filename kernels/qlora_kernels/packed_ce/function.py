"""The public function: checks its arguments, picks the path, reduces per row, per document and in all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels.packed_ce.chunked import ChunkedCrossEntropy
from qlora_kernels.packed_ce.reference import reference_linear_cross_entropy
from qlora_kernels.packed_ce.targets import Targets


@dataclass(frozen=True)
class CEOutput:
    """loss: scalar, differentiable. The rest is detached and free: nll float32 [M] in nats, hit bool [M] (the
    largest logit is the target's), per_document float32 [n_documents, 2] (sum of nll, number of rows)."""

    loss: Tensor
    nll: Tensor
    hit: Tensor
    per_document: Tensor


def packed_linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Targets,
    *,
    n_items: float | None = None,
    row_weights: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> CEOutput:
    """Mean (or ``n_items``-normalised) cross-entropy of the supervised rows, without the full logits.

    ``loss = sum_i w_i * nll_i / n_items``, ``nll_i = logsumexp(z_i) - z_i[y_i]``,
    ``z_i = cap * tanh(scale * hidden[rows_i] @ head.T / cap)`` (no cap by default).

    Args:
        hidden: [T, D] last hidden states, any floating dtype.
        head: [V, D] output embedding. Frozen: its gradient costs nothing; trainable: the plain path is taken.
        targets: the supervised rows, see `Targets`.
        n_items: the divisor, e.g. the supervised tokens of a whole accumulation group; default: the sum of the
            row weights (the number of rows without any).
        row_weights: float [M], default 1.
        softcap, logit_scale: as the model's configuration has them.

    Returns `CEOutput`. Zero rows give loss 0 with a zero gradient, not NaN.
    Raises ValueError naming the argument for wrong shapes, dtypes, devices.
    """
    _check(hidden, head, targets, row_weights)
    if len(targets) == 0:
        nothing = hidden.new_zeros(0, dtype=torch.float32)
        per_document = nothing.new_zeros(targets.n_documents, 2)
        return CEOutput(hidden.sum() * 0.0, nothing, nothing.bool(), per_document)
    # Autocast would run the products of this function in half precision, behind the back of its float32 casts.
    with torch.autocast(hidden.device.type, enabled=False):
        if head.requires_grad:
            nll, hit = reference_linear_cross_entropy(hidden, head, targets, softcap=softcap, logit_scale=logit_scale)
        else:
            nll, hit = ChunkedCrossEntropy.apply(hidden, head, targets.rows, targets.ids, softcap, logit_scale)
    weighted = nll if row_weights is None else nll * row_weights.to(nll.dtype)
    if n_items is None:
        divisor = float(len(targets)) if row_weights is None else row_weights.sum().clamp(min=1e-30)
    else:
        divisor = n_items
    nll = nll.detach()
    return CEOutput(weighted.sum() / divisor, nll, hit, _per_document(nll, targets))


def _per_document(nll: Tensor, targets: Targets) -> Tensor:
    sums = nll.new_zeros(targets.n_documents, 2)
    documents = targets.docs.long()
    sums[:, 0].index_add_(0, documents, nll)
    sums[:, 1].index_add_(0, documents, torch.ones_like(nll))
    return sums


def _check(hidden: Tensor, head: Tensor, targets: Targets, row_weights: Tensor | None) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: expected floating [T, D], got {hidden.dtype} {list(hidden.shape)}")
    if head.dim() != 2 or head.shape[1] != hidden.shape[1] or not head.is_floating_point():
        expected = f"floating [V, {hidden.shape[1]}]"
        raise ValueError(f"head: expected {expected}, got {head.dtype} {list(head.shape)}")
    for name, tensor in (("head", head), ("targets.rows", targets.rows), ("targets.ids", targets.ids)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    if row_weights is not None and row_weights.shape != targets.rows.shape:
        raise ValueError(f"row_weights: expected [{len(targets)}], got {list(row_weights.shape)}")
    if hidden.device.type == "cpu" and len(targets):
        # On a CPU looking is free; on a GPU it would make the host wait for the device.
        highest_row, highest_id = int(targets.rows.max()), int(targets.ids.max())
        if int(targets.rows.min()) < 0 or highest_row >= hidden.shape[0]:
            raise ValueError(f"targets.rows: {highest_row} is outside of the {hidden.shape[0]} rows of hidden")
        if int(targets.ids.min()) < 0 or highest_id >= head.shape[0]:
            low = int(targets.ids.min())
            raise ValueError(f"targets.ids: {low}..{highest_id} is outside of the vocabulary of {head.shape[0]}")
