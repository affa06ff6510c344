"""From the sum over the other classes to the loss of a row and the factors of its gradient.

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
class RowState:
    """Running values of the rows while the vocabulary goes by, all [M], logits in units of log 2.

    target: z_y; shift: m; others: s; top: largest z_j, j != y; z_sum: sum of all z_j (kept for label smoothing).
    """

    target: Tensor
    shift: Tensor
    others: Tensor
    top: Tensor
    z_sum: Tensor

    @classmethod
    def begin(cls, target: Tensor, shift: Tensor) -> RowState:
        zeros = torch.zeros_like(shift)
        return cls(target, shift, zeros, torch.full_like(shift, -torch.inf), zeros.clone())

    def part(self, rows: slice) -> RowState:
        return RowState(*(t[rows] for t in (self.target, self.shift, self.others, self.top, self.z_sum)))


@dataclass(frozen=True)
class Finished:
    """Per row: the objective and nll in nats, hit, and the gradient's factors: ``dz_j = of_sum * 2^(z_j - m)`` for
    the other classes and ``of_target`` for the target, before ``- label_smoothing / V`` on all classes."""

    objective: Tensor
    nll: Tensor
    hit: Tensor
    of_sum: Tensor
    of_target: Tensor


def finish(state: RowState, options: Options, vocabulary: int) -> Finished:
    gap = state.shift - state.target
    ratio = torch.exp2(-gap)
    denominator = state.others + ratio
    # Far below the largest logit, s / r overflows; there the plain logarithm is exact enough.
    near = torch.log1p(state.others * torch.exp2(gap.clamp(max=60)))
    nll = torch.where(gap < 60, near, LN2 * (gap + torch.log2(denominator)))
    lse = nll + LN2 * state.target
    objective, extra = nll, 2 * options.z_loss * lse
    if options.label_smoothing:
        objective = objective + options.label_smoothing * LN2 * (state.target - state.z_sum / vocabulary)
    if options.z_loss:
        objective = objective + options.z_loss * lse.square()
    of_target = (extra * ratio - state.others) / denominator + options.label_smoothing
    return Finished(objective, nll, state.top <= state.target, (1 + extra) / denominator, of_target)
