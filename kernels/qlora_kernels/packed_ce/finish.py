"""Computes the loss of a row and the factors of its gradient from the sum over the other classes.

With the shift ``m`` of a row (in units of log 2), ``s = sum_{j != y} 2^(z_j - m)`` and ``r = 2^(z_y - m)``::

    nll = log(1 + s / r)        p_j = 2^(z_j - m) / (s + r)        1 - p_y = s / (s + r)

Neither ``logsumexp - z_y`` nor ``p_y - 1`` is ever formed: for a token predicted with p near 1 both would cancel to
nothing, and these do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels.packed_ce.options import LN2, Options


@dataclass(frozen=True)
class OnlineSoftmax:
    """Holds the running values of an online softmax while the vocabulary goes by tile by tile, all [M].

    target: z_y; shift: m; sum_exp: s; max_logit: largest z_j, j != y; z_sum: sum of all z_j (kept for label smoothing).
    Logits are in units of log 2.
    """

    target: Tensor
    shift: Tensor
    sum_exp: Tensor
    max_logit: Tensor
    z_sum: Tensor

    @classmethod
    def begin(cls, target: Tensor, shift: Tensor) -> OnlineSoftmax:
        """Returns the state before the first tile: no other class has been seen yet."""
        zeros = torch.zeros_like(shift)
        return cls(target, shift, zeros, torch.full_like(shift, -torch.inf), zeros.clone())

    def part(self, rows: slice) -> OnlineSoftmax:
        """Returns the state of some rows, as views."""
        return OnlineSoftmax(*(t[rows] for t in (self.target, self.shift, self.sum_exp, self.max_logit, self.z_sum)))


@dataclass(frozen=True)
class Finished:
    """Holds the result for each row of logits: its losses in nats, whether it is correct, and its gradient's factors.

    The gradient is ``dz_j = sum_factor * 2^(z_j - m)`` for the other classes and ``target_factor`` for the target,
    before ``- label_smoothing / V`` on all classes.
    """

    token_loss: Tensor
    nll: Tensor
    correct: Tensor
    sum_factor: Tensor
    target_factor: Tensor


def finish(state: OnlineSoftmax, options: Options, vocabulary: int) -> Finished:
    """Turns the running values of all rows into their losses and the factors of their gradient."""
    gap = state.shift - state.target
    ratio = torch.exp2(-gap)
    denominator = state.sum_exp + ratio
    # Far below the largest logit, s / r overflows; there the plain logarithm is exact enough.
    near = torch.log1p(state.sum_exp * torch.exp2(gap.clamp(max=60)))
    nll = torch.where(gap < 60, near, LN2 * (gap + torch.log2(denominator)))
    lse = nll + LN2 * state.target
    token_loss, extra = nll, 2 * options.z_loss * lse
    if options.label_smoothing:
        token_loss = token_loss + options.label_smoothing * LN2 * (state.target - state.z_sum / vocabulary)
    if options.z_loss:
        token_loss = token_loss + options.z_loss * lse.square()
    target_factor = (extra * ratio - state.sum_exp) / denominator + options.label_smoothing
    return Finished(token_loss, nll, state.max_logit <= state.target, (1 + extra) / denominator, target_factor)
