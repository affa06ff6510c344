"""Holds a model to its base on replayed rows: the divergence of its predictions from those without the adapter.

At a supervised position with the probabilities p of the base and q of the model it is the same that ``evaluate``
reports as drift, and what Li and Hoiem's "Learning without Forgetting" (2016) calls distillation of the old model::

    KL(p || q) = sum_v p_v (log p_v - log q_v)          d KL / d z_v = q_v - p_v

The base reads the documents of replay only, without gradients. Logits exist for a few positions at a time: their
gradient is formed in the forward, while they are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from qlora_kernels.packed_ce import NF4Head, PatchedHead
from qlora_kernels.packed_ce.head import head_rows
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qlora_sft.data.batch import Replayed
from qlora_sft.model.base import base_of
from qlora_sft.model.head import loss_weight
from qlora_sft.model.loss import LogitTransform, last_hidden_states, logit_transform

if TYPE_CHECKING:
    from peft import PeftModel

# Of the logits of a few positions and what is made of them, eight of their size at once.
CHUNK_BYTES, BUFFERS = 2**28, 8
# Of the rows of the head that are in float32 at one time.
TILE_BYTES = 2**26


class Head(NamedTuple):
    """Holds all that turns hidden states into logits."""

    weight: Tensor | NF4Head | PatchedHead
    bias: Tensor | None
    transform: LogitTransform

    @property
    def base(self) -> Head:
        """Returns the head without rows that are trained."""
        return self._replace(weight=self.weight.base) if isinstance(self.weight, PatchedHead) else self


def head_of(model: PeftModel) -> Head:
    """Returns the output head of ``model``."""
    base = base_of(model)
    module = base.get_output_embeddings()
    return Head(loss_weight(module), getattr(module, "bias", None), logit_transform(base.config))


def base_hidden_states(model: PeftModel, replayed: Replayed) -> Tensor:
    """Returns what the base, without the adapter and without dropout, makes of the positions of ``replayed``, [M, D].

    It draws no random numbers.
    """
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            hidden = last_hidden_states(model, replayed["documents"])[0]
    finally:
        model.train()
    return hidden[replayed["documents"]["positions"].long()]


def divergence_from(base: Tensor, model: PeftModel, hidden: Tensor, replayed: Replayed) -> Tensor:
    """Returns the divergence at the positions of ``replayed``, summed by their weights, in nats.

    base: as of `base_hidden_states`. hidden: [T, D], what the model has made of the whole micro-batch; it gets the
    gradient, and so do rows of the head that are trained.
    """
    head = head_of(model)
    rows = head.weight.values if isinstance(head.weight, PatchedHead) else None
    weights = replayed["documents"]["position_weights"]
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _Divergence.apply(hidden[replayed["places"]], rows, base, weights, head)  # type: ignore[no-untyped-call]
    return total


class _Divergence(torch.autograd.Function):
    """Sums weighted divergences, and keeps only the gradients of the hidden states and of the trained rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, rows: Tensor | None, base: Tensor, weights: Tensor, head: Head
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        of_hidden, of_rows = torch.empty_like(hidden), None if rows is None else torch.zeros_like(rows).float()
        size = positions_at_once(head.weight.shape[0])
        for start in range(0, len(hidden), size):
            some = slice(start, start + size)
            x = hidden[some].float()
            logits, slope = logits_of(x, head)
            log_q = logits.log_softmax(-1)
            log_p = logits_of(base[some].float(), head.base)[0].log_softmax(-1)
            p = log_p.exp()
            total += ((p * (log_p - log_q)).sum(-1) * weights[some]).sum()
            gradient = (log_q.exp() - p).mul_(weights[some, None]).mul_(slope)
            of_hidden[some] = _times_head(gradient, head).to(hidden.dtype)
            if of_rows is not None and isinstance(head.weight, PatchedHead):
                ids = torch.tensor(head.weight.token_ids, device=hidden.device)
                of_rows += gradient[:, ids].T @ x
        ctx.save_for_backward(of_hidden, *([] if of_rows is None else [of_rows]))
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, above: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        of_hidden, *of_rows = ctx.saved_tensors  # type: ignore[attr-defined]
        return above * of_hidden, above * of_rows[0] if of_rows else None, None, None, None


def positions_at_once(vocabulary: int) -> int:
    """Returns the number of positions whose logits are in memory together."""
    return max(1, CHUNK_BYTES // (BUFFERS * 4 * vocabulary))


def logits_of(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | float]:
    """Returns the logits of ``hidden`` [n, D] in float32, and their slope by the products that they come from."""
    products = torch.cat([hidden @ rows.T for rows in _tiles(head)], dim=1)
    if head.bias is not None:
        products += head.bias.detach().float()
    scale, cap = head.transform.get("logit_scale", 1.0), head.transform.get("softcap")
    if cap is None:
        return products.mul_(scale), scale
    bent = products.mul_(scale / cap).tanh_()
    return bent * cap, bent.square_().neg_().add_(1).mul_(scale)


def _times_head(gradient: Tensor, head: Head) -> Tensor:
    """Returns the gradient of the hidden states, from that of the products [n, V]."""
    result, first = torch.zeros(1, device=gradient.device), 0
    for rows in _tiles(head):
        result = result + gradient[:, first : first + len(rows)] @ rows
        first += len(rows)
    return result


def _tiles(head: Head) -> Iterator[Tensor]:
    """Yields the rows of the head in float32, some at a time."""
    vocabulary, width = head.weight.shape
    size = max(1, TILE_BYTES // (4 * width))
    for start in range(0, vocabulary, size):
        yield head_rows(head.weight, slice(start, min(start + size, vocabulary)), torch.float32)


def leash_bytes(vocabulary: int, width: int, tokens: int, dtype: torch.dtype) -> int:
    """Returns the most bytes that the leash takes between forward and backward for ``tokens``, all of them of replay:
    the base's hidden states and the gradient of the model's, the logits of some positions, and a tile of the head."""
    logits = BUFFERS * 4 * vocabulary * min(tokens, positions_at_once(vocabulary))
    return 2 * tokens * width * dtype.itemsize + logits + min(TILE_BYTES, 4 * vocabulary * width)
