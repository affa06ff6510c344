"""Computes the gradient of a head's few trained rows from the losses of the supervised positions.

Per supervised position i and trained token j, with ``lse_i = nll_i + z_iy`` (nothing of the forward is kept but nll)::

    p_ij = exp(z_ij - lse_i)        of the target itself  p - 1 = expm1(-nll), exact where p is near 1
    dl_i / dz_ij = p_ij (1 + 2 z_loss lse_i) - [j = y_i] + label_smoothing ([j = y_i] - 1 / V)
    d values_j = sum_i factor_i (dl_i / dz_ij) (dz_ij / dx_ij) h_i

It is plain torch on every device. It forms M x k logits and gathers one row of the head per supervised position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels.packed_ce.head import PatchedHead, head_rows
from qlora_kernels.packed_ce.inputs import LossInputs
from qlora_kernels.packed_ce.options import Options
from qlora_kernels.packed_ce.workspace import PATCHED_ROWS


def values_gradient(inputs: LossInputs, nll: Tensor, factors: Tensor) -> Tensor:
    """Returns the gradient of the trained rows, [k, D] in at least float32. nll, factors: [M]."""
    head, o = inputs.head, inputs.options
    assert isinstance(head, PatchedHead)
    hidden, dtype = inputs.hidden.detach(), torch.promote_types(inputs.hidden.dtype, torch.float32)
    values = head.values.detach().to(head.dtype).to(dtype)
    gradient = torch.zeros_like(values)
    bias = None if inputs.bias is None else inputs.bias.detach().to(dtype)
    of_tokens = 0.0 if bias is None else torch.stack([bias[token] for token in head.token_ids])
    for start in range(0, len(nll), PATCHED_ROWS):
        part = slice(start, start + PATCHED_ROWS)
        x, y = hidden[inputs.positions[part].long()].to(dtype), inputs.labels[part].long()
        known = y.clamp(0, inputs.vocabulary - 1)  # of any other target nll is NaN already
        target = (x * head_rows(head, known, head.dtype).to(dtype)).sum(1)
        z_y, _ = _transform(target if bias is None else target + bias[known], o)
        z, slope = _transform(x @ values.t() + of_tokens, o)
        loss = nll[part].to(dtype)
        lse = loss + z_y
        extra = 2 * o.z_loss * lse[:, None]
        own = torch.stack([y == token for token in head.token_ids], dim=1)
        others = (z - lse[:, None]).exp() * (1 + extra)
        of_target = torch.expm1(-loss)[:, None] + (-loss).exp()[:, None] * extra
        dz = torch.where(own, of_target, others) + o.label_smoothing * (own.to(dtype) - 1 / inputs.vocabulary)
        gradient += (dz * slope * factors[part, None].to(dtype)).t() @ x
    return gradient


def _transform(x: Tensor, o: Options) -> tuple[Tensor, Tensor | float]:
    """Returns ``z`` and ``dz / dx``."""
    z = x * o.logit_scale
    if o.softcap is None:
        return z, o.logit_scale
    t = torch.tanh(z / o.softcap)
    return o.softcap * t, o.logit_scale * (1 - t.square())
