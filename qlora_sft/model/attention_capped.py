"""Causal attention inside documents with what FlashAttention lacks: capped logits and attention sinks.

``plain_documents`` is the textbook, for a CPU; ``flex_documents`` the same as one FlexAttention kernel, for a GPU.
Both take a sliding window. Formulas, for the logits ``l = scaling * q k^T`` of one head::

    cap:   l <- cap * tanh(l / cap)
    sinks: softmax over the keys and one more logit s, whose share is attended by nothing
           = softmax over the keys * sigmoid(logsumexp(l) - s)
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def in_band(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: query i sees key j iff ``i - window < j <= i``."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() if window is None else ones.tril().triu(1 - window)


def plain_documents(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, dropout: float,
    window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """query [1, H, T, d], key and value [1, Hkv, T, d], sinks [H] -> [1, T, H, d]. Memory: the square of a document."""
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for a, b in pairwise(bounds.tolist()):
        k, v = (x[:, :, a:b].repeat_interleave(groups, dim=1) for x in (key, value))
        logits = query[:, :, a:b] @ k.transpose(2, 3) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~in_band(b - a, window, query.device), -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(logits).view(1, -1, 1, 1).expand(1, -1, b - a, 1)], dim=-1)
        shares = torch.softmax(logits, dim=-1, dtype=torch.float32)[..., : b - a].to(query.dtype)
        outputs.append(torch.dropout(shares, dropout, train=dropout > 0) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def flex_documents(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None,
    window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same, blocks of other documents are skipped. Untested on a GPU; on a CPU it runs uncompiled, for tests."""
    from torch.nn.attention.flex_attention import AuxRequest

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    out, aux = _flex(query.is_cuda)(
        query, key, value,
        score_mod=None if softcap is None else cap,
        block_mask=_block_mask(bounds, query.shape[2], window),
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=sinks is not None),
    )  # fmt: skip
    if sinks is not None:
        out = out * torch.sigmoid(aux.lse - sinks.view(1, -1, 1))[..., None].to(out.dtype)
    transposed: Tensor = out.transpose(1, 2)
    return transposed


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Rows differ in length from step to step; without `dynamic` each would be compiled anew.
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


# All layers of a forward (and of its recomputation) come with the same tensor of bounds.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _block_mask(bounds: Tensor, length: int, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    made = _masks.setdefault(bounds, {})
    if window not in made:
        document = torch.searchsorted(bounds[1:].contiguous(), torch.arange(length, device=bounds.device), right=True)

        def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            inside = (document[i] == document[j]) & (j <= i)
            return inside if window is None else inside & (i - j < window)

        made[window] = create_block_mask(visible, None, None, length, length, device=str(bounds.device))
    return made[window]
