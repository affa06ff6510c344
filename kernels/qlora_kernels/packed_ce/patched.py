"""The gradient of a head's few trained rows, from the losses of the supervised rows.

Per supervised row i and trained word j, with ``lse_i = nll_i + z_iy`` (nothing of the forward is kept but nll)::

    p_ij = exp(z_ij - lse_i)        of the target itself  p - 1 = expm1(-nll), exact where p is near 1
    dl_i / dz_ij = p_ij (1 + 2 z_loss lse_i) - [j = y_i] + label_smoothing ([j = y_i] - 1 / V)
    d values_j = sum_i factor_i (dl_i / dz_ij) (dz_ij / dx_ij) h_i

Plain torch on every device: M x k logits and one gathered row of the head per supervised row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels.packed_ce.head import PatchedHead, head_rows
from qlora_kernels.packed_ce.options import Options
from qlora_kernels.packed_ce.problem import Problem
from qlora_kernels.packed_ce.workspace import PATCHED_ROWS


def values_gradient(problem: Problem, nll: Tensor, factors: Tensor) -> Tensor:
    """nll, factors: [M] -> [k, D] in at least float32."""
    head, o = problem.head, problem.options
    assert isinstance(head, PatchedHead)
    hidden, dtype = problem.hidden.detach(), torch.promote_types(problem.hidden.dtype, torch.float32)
    values = head.values.detach().to(head.dtype).to(dtype)
    gradient = torch.zeros_like(values)
    bias = None if problem.bias is None else problem.bias.detach().to(dtype)
    of_words = 0.0 if bias is None else torch.stack([bias[word] for word in head.ids])
    for start in range(0, len(nll), PATCHED_ROWS):
        part = slice(start, start + PATCHED_ROWS)
        x, y = hidden[problem.rows[part].long()].to(dtype), problem.ids[part].long()
        known = y.clamp(0, problem.vocabulary - 1)  # of any other target nll is NaN already
        target = (x * head_rows(head, known, head.dtype).to(dtype)).sum(1)
        z_y, _ = _transform(target if bias is None else target + bias[known], o)
        z, slope = _transform(x @ values.t() + of_words, o)
        loss = nll[part].to(dtype)
        lse = loss + z_y
        extra = 2 * o.z_loss * lse[:, None]
        own = torch.stack([y == word for word in head.ids], dim=1)
        others = (z - lse[:, None]).exp() * (1 + extra)
        of_target = torch.expm1(-loss)[:, None] + (-loss).exp()[:, None] * extra
        dz = torch.where(own, of_target, others) + o.label_smoothing * (own.to(dtype) - 1 / problem.vocabulary)
        gradient += (dz * slope * factors[part, None].to(dtype)).t() @ x
    return gradient


def _transform(x: Tensor, o: Options) -> tuple[Tensor, Tensor | float]:
    """``z`` and ``dz / dx``"""
    z = x * o.logit_scale
    if o.softcap is None:
        return z, o.logit_scale
    t = torch.tanh(z / o.softcap)
    return o.softcap * t, o.logit_scale * (1 - t.square())
