"""What a model thinks of texts it did not write: loss per token, and how far it has moved from its base.

The distance is ``KL(base || tuned)``: ``sum_v p_base(v) (log p_base(v) - log p_tuned(v))`` in nats, its mean over
supervised tokens. That is what it costs to code the base's own words with the tuned model. It sees changes that the
loss does not, because it looks at all words and not only at the one that stands there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_sft.data.render import Rendered
from qlora_sft.errors import RunError, first_line
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.model.attention import plain_attention

# Of a document: all logits of it are alive at once, twice.
TOKENS = 2048
# Rows whose probabilities are in float32 at one time.
ROWS = 256


@dataclass(frozen=True)
class Reading:
    """One document: the weight of its supervised tokens, their mean loss, their KL from the base if that was read."""

    weight: float
    loss: float
    base_loss: float | None = None
    kl: float | None = None


def read(model: Any, document: Rendered, dtype: torch.dtype, with_base: bool) -> Reading:
    """One forward with the adapter, and with ``with_base`` one without it."""
    ids = torch.tensor([document.input_ids], device=model.device)
    weights = torch.tensor(document.weights[1:], device=model.device)
    rows = weights.nonzero().squeeze(1)
    weights, targets = weights[rows], ids[0, 1:][rows]
    with plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
        try:
            tuned = model(input_ids=ids, use_cache=False).logits[0][rows]
            if with_base:
                with model.disable_adapter():
                    base = model(input_ids=ids, use_cache=False).logits[0][rows]
        except torch.OutOfMemoryError as error:
            raise RunError(f"the GPU has no room to read {ids.shape[1]:,} tokens ({first_line(error)})") from None
    total = float(weights.sum())
    loss = float((_nll(tuned, targets) * weights).sum()) / total
    if not with_base:
        return Reading(total, loss)
    base_loss = float((_nll(base, targets) * weights).sum()) / total
    return Reading(total, loss, base_loss, float((divergence(base, tuned) * weights).sum()) / total)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
            for part, wanted in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        ]
    )


def divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base || tuned) of every row of two [M, V] logits, [M] in nats."""
    parts = []
    for p, q in zip(base.split(ROWS), tuned.split(ROWS), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def readable(document: Rendered, limit: int = TOKENS) -> Rendered | None:
    """Its first `TOKENS`, or as many as the model has positions; None if nothing in them is to be predicted."""
    tokens = min(TOKENS, limit)
    short = Rendered(document.input_ids[:tokens], document.weights[:tokens], document.source)
    return short if any(short.weights[1:]) else None
