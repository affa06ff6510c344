"""Measures a model on given texts: its loss per token, and how far its predictions have moved from those of its base.

The distance is ``KL(base || tuned)``: ``sum_v p_base(v) (log p_base(v) - log p_tuned(v))`` in nats, averaged over the
supervised tokens. It is the cost of coding the base's own tokens with the tuned model. It shows changes that the loss
does not show, because it looks at all tokens of the vocabulary and not only at the label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_sft.data.render import Rendered
from qlora_sft.errors import RunError, first_line
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.evaluation.no_numbers import no_numbers
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.full_memory import is_memory_full

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The most tokens that are read of a document, because all of its logits are in memory at once, twice.
TOKENS = 2048
# The number of positions whose probabilities are in float32 at one time.
POSITIONS = 256


@dataclass(frozen=True)
class Reading:
    """Holds the figures of one document."""

    weight: float
    """The summed weight of its supervised tokens."""
    loss: float
    """The mean loss of the supervised tokens, in nats."""
    base_loss: float | None = None
    kl: float | None = None
    """The mean KL divergence from the base, if the base has read the document, too."""


def read(model: PreTrainedModel, document: Rendered, dtype: torch.dtype, with_base: bool) -> Reading:
    """Reads a document with the adapter and, if ``with_base``, once more without it."""
    ids = torch.tensor([document.input_ids], device=model.device)
    weights = torch.tensor(document.weights[1:], device=model.device)
    positions = weights.nonzero().squeeze(1)
    weights, labels = weights[positions], ids[0, 1:][positions]
    with plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
        try:
            tuned = model(input_ids=ids, use_cache=False).logits[0][positions]
            if with_base:
                with model.disable_adapter():
                    base = model(input_ids=ids, use_cache=False).logits[0][positions]
        except Exception as error:
            if not is_memory_full(error):
                raise
            raise RunError(
                f"there is not enough memory to read {ids.shape[1]:,} tokens ({first_line(error)})"
            ) from None
    total = float(weights.sum())
    loss = float((_nll(tuned, labels) * weights).sum()) / total
    if math.isnan(loss):
        raise no_numbers()
    if not with_base:
        return Reading(total, loss)
    base_loss = float((_nll(base, labels) * weights).sum()) / total
    if math.isnan(base_loss):
        raise no_numbers()
    return Reading(total, loss, base_loss, float((divergence(base, tuned) * weights).sum()) / total)


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the negative log-likelihood of every label, [M] in nats."""
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
            for part, wanted in zip(logits.split(POSITIONS), labels.split(POSITIONS), strict=True)
        ]
    )


def divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """Returns KL(base || tuned) at every position of two [M, V] logits, [M] in nats."""
    parts = []
    for p, q in zip(base.split(POSITIONS), tuned.split(POSITIONS), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def readable(document: Rendered, limit: int = TOKENS) -> Rendered | None:
    """Cuts a document to `TOKENS`, or to ``limit``, the number of positions that the model has.

    Returns None if nothing in what is left is to be predicted.
    """
    tokens = min(TOKENS, limit)
    short = Rendered(document.input_ids[:tokens], document.weights[:tokens], document.source)
    return short if any(short.weights[1:]) else None
