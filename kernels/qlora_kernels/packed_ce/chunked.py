"""The loss in chunks of supervised rows, in plain torch: the path on a CPU.

Only supervised rows are gathered, a chunk's logits are turned into their own gradient in place, and what is
kept for the backward pass is ``U[M, D] = d nll / d hidden`` alone: two matrix products, no recomputation,
and never more logits than the workspace holds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows per chunk are chosen so that a chunk's float32 logits stay within this.
WORKSPACE_BYTES = 128 * 2**20


def rows_per_chunk(n_rows: int, vocabulary: int, workspace_bytes: int = WORKSPACE_BYTES) -> int:
    """Equal chunks, as large as the workspace allows: a ragged last chunk would waste a matrix product."""
    largest = max(1, workspace_bytes // (4 * vocabulary))
    n_chunks = max(1, -(-n_rows // largest))
    return max(1, -(-n_rows // n_chunks))


class ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden [T, D], head [V, D] frozen, rows [M], ids [M]) -> (nll float32 [M], hit bool [M])."""

    @staticmethod
    def forward(ctx, hidden, head, rows, ids, softcap, logit_scale):  # type: ignore[no-untyped-def]
        rows, ids = rows.long(), ids.long()
        compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight = head.to(compute)
        nll = torch.empty(len(rows), dtype=compute, device=hidden.device)
        hit = torch.empty(len(rows), dtype=torch.bool, device=hidden.device)
        needs_gradient = hidden.requires_grad
        unscaled = hidden.new_empty((len(rows), hidden.shape[1])) if needs_gradient else None
        step = rows_per_chunk(len(rows), head.shape[0])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            logits = hidden[rows[part]].to(compute) @ weight.t()
            slope = _transform_(logits, logit_scale, softcap, needs_gradient)
            nll[part], hit[part] = _loss_to_gradient_(logits, ids[part])
            if unscaled is not None:
                if slope is not None:
                    logits.mul_(slope)
                unscaled[part] = (logits @ weight).mul_(logit_scale).to(hidden.dtype)
        ctx.save_for_backward(unscaled, rows)
        ctx.hidden_shape = hidden.shape
        ctx.mark_non_differentiable(hit)
        return nll, hit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll, _grad_hit):  # type: ignore[no-untyped-def]
        unscaled, rows = ctx.saved_tensors
        grad_hidden = unscaled.new_zeros(ctx.hidden_shape)
        # Scaled in float32 and rounded once; the rows are distinct, so this is a copy, not a sum.
        grad_hidden[rows] = (unscaled.to(grad_nll.dtype) * grad_nll[:, None]).to(unscaled.dtype)
        return grad_hidden, None, None, None, None, None


def _transform_(logits: Tensor, logit_scale: float, softcap: float | None, needs_slope: bool) -> Tensor | None:
    """In place ``z = cap * tanh(scale * x / cap)``; returns ``dz / d(scale * x) = 1 - tanh^2`` if there is a cap."""
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square() if needs_slope else None
    logits.mul_(softcap)
    return slope


def _loss_to_gradient_(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(nll, hit) of each row; ``logits`` becomes ``softmax(logits) - onehot(ids)`` in place.

    With the sum over the *other* classes, ``s = sum_{j != y} exp(z_j - m)`` and ``q = m + log s - z_y`` (the log
    odds of "not the target"), the loss is ``softplus(q)`` and the target's gradient ``-sigmoid(q)``. Both stay
    exact for a token predicted with p near 1, where ``logsumexp - z_y`` and ``p - 1`` cancel to nothing.
    """
    index = ids[:, None]
    target = logits.gather(1, index).squeeze(1)
    logits.scatter_(1, index, float("-inf"))
    largest_other = logits.amax(1)
    logits.sub_(largest_other[:, None]).exp_()
    sum_others = logits.sum(1)
    log_odds_against = largest_other + sum_others.log() - target
    nll = torch.nn.functional.softplus(log_odds_against)
    # softmax_j = exp(z_j - lse), and lse = nll + z_y.
    logits.mul_((largest_other - nll - target).exp()[:, None])
    logits.scatter_(1, index, -torch.sigmoid(log_odds_against)[:, None])
    return nll, target >= largest_other
