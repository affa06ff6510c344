"""Computes the textbook loss: all the logits at once, autograd for the gradient. Slow, large, and easy to trust."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels.packed_ce.targets import Targets


def transform_logits(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Returns ``z = scale * x``, and ``cap * tanh(z / cap)`` of it for models that cap their logits (Gemma 2)."""
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Targets,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``l_i``, ``nll_i`` and correct of every position, as `packed_linear_cross_entropy` defines them.

    hidden [T, D], head [V, D], bias [V] -> float32 [M], float32 [M], bool [M]. All three may require a gradient.
    Computed in float32, or float64 for float64 input.
    """
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden[targets.positions.long()].to(compute) @ head.to(compute).t()
    logits = transform_logits(logits if bias is None else logits + bias.to(compute), logit_scale, softcap)
    labels = targets.labels.long()
    nll = F.cross_entropy(logits, labels, reduction="none")
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    loss = loss + z_loss * logits.logsumexp(-1).square()
    return loss, nll, logits.argmax(-1) == labels
