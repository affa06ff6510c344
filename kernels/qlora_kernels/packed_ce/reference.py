"""The textbook loss: all the logits at once, autograd for the gradient. Slow, large, and easy to trust."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.packed_ce.targets import Targets


def transform_logits(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """``z = scale * x``, then ``cap * tanh(z / cap)`` for models that cap their logits (Gemma 2)."""
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Targets, *, softcap: float | None = None, logit_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Per-row ``nll_i = logsumexp(z_i) - z_i[y_i]`` with ``z_i = transform(hidden[rows_i] @ head.T)``.

    hidden [T, D], head [V, D] -> nll float32 [M], hit bool [M] (the largest logit is the target's).
    Both arguments may require a gradient. Computed in float32, or float64 for float64 input.
    """
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden[targets.rows.long()].to(compute) @ head.to(compute).t()
    logits = transform_logits(logits, logit_scale, softcap)
    nll = F.cross_entropy(logits, targets.ids.long(), reduction="none")
    return nll, logits.argmax(-1) == targets.ids
