"""Attends causally inside documents with what FlashAttention lacks: capped logits, sinks, windows over a tree.

``plain_documents`` is the textbook, for a CPU; ``flex_documents`` is the same as one FlexAttention kernel, for a GPU.
Both take a sliding window, and a tree of prefixes in place of documents. Formulas, for the logits
``l = scaling * q k^T`` of one head::

    cap:   l <- cap * tanh(l / cap)
    sinks: softmax over the keys and one more logit s, whose share is attended by nothing
           = softmax over the keys * sigmoid(logsumexp(l) - s)
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qlora_sft.model.block_mask import BLOCK, Reach, block_mask_of, reach_of
from qlora_sft.model.bounds import parts_of

# So many variants of FlexAttention are compiled before torch gives up; its default is 8. There are layers with and
# without a window, gradients on and off, two lengths of each until torch makes the length a variable, and all that for
# every such model of the process.
VARIANTS = 64


class Scores(NamedTuple):
    """Says how the products of queries and keys become the weights of values."""

    scaling: float | None = None
    """What they are multiplied by; default: the inverse root of the size of a head."""
    window: int | None = None
    """A token sees itself and the ``window - 1`` tokens before it; default: all of them."""
    softcap: float | None = None
    sinks: Tensor | None = None
    """[H]"""
    dropout: float = 0.0


def in_band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Returns bool [queries, keys], where the queries are of the last of the keys: query i of key ``p = keys - queries
    + i`` sees key j iff ``p - window < j <= p``."""
    before = keys - queries
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
    return ones if window is None else ones.triu(before + 1 - window)


def plain_documents(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scores: Scores) -> Tensor:
    """Attends in plain products: query [1, H, T, d], key and value [1, Hkv, T, d] -> [1, T, H, d].

    It takes memory for the square of a document, and of a tree for every segment times what stands before it.
    """
    scaling, window, softcap, sinks, dropout = scores
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for q, *shared in parts_of(query, key, value, bounds, window):
        k, v = (x.repeat_interleave(groups, dim=1) for x in shared)
        length, seen = q.shape[2], k.shape[2]
        logits = q @ k.transpose(2, 3) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~in_band(length, seen, window, query.device), -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(logits).view(1, -1, 1, 1).expand(1, -1, length, 1)], dim=-1)
        shares = torch.softmax(logits, dim=-1, dtype=torch.float32)[..., :seen].to(query.dtype)
        outputs.append(torch.dropout(shares, dropout, train=dropout > 0) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def flex_documents(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scores: Scores) -> Tensor:
    """Computes the same, without dropout, in one kernel, which skips the blocks of other documents.

    On a CPU it runs uncompiled.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    scaling, window, softcap, sinks, _ = scores
    length = query.shape[2]
    whole = whole_blocks(length)
    # The sequence is filled up with one more document. A length that is no multiple of a block, and one of a single
    # block, would each be compiled separately.
    query, key, value = (F.pad(x, (0, 0, 0, whole - length)) for x in (query, key, value))
    attend = compiled_flex if query.is_cuda else plain_flex
    out, aux = attend()(
        query, key, value,
        score_mod=None if softcap is None else cap_of(softcap),
        block_mask=_block_mask(bounds, whole, window),
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=sinks is not None),
    )  # fmt: skip
    if sinks is not None:
        out = out * torch.sigmoid(aux.lse - sinks.view(1, -1, 1))[..., None].to(out.dtype)
    transposed: Tensor = out[:, :, :length].transpose(1, 2)
    return transposed


def whole_blocks(length: int) -> int:
    """Returns the length in whole blocks of FlexAttention, at least two."""
    return max(2, -(-length // BLOCK)) * BLOCK


def plain_flex() -> Any:
    """Returns FlexAttention as it is, which forms all logits."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def compiled_flex(backend: Any = "inductor") -> Any:
    """Returns FlexAttention compiled by ``backend``. At the second length torch makes it a variable.

    fullgraph: what cannot be compiled is an error; run eagerly it would take the square of the sequence.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, backend=backend)

    def attend(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return compiled(*args, **kwargs)

    return attend


# The compiler turns a Python number that a function refers to into a variable as soon as it sees a second value, and
# FlexAttention's kernel takes no variable float. A string stays what it is, so the number is read from one.


@cache
def cap_of(softcap: float) -> Any:
    """Returns the function that caps one logit, with ``softcap`` as a constant of the compiled kernel."""
    text = repr(float(softcap))

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        value = float(text)
        return value * torch.tanh(score / value)

    return cap


def visible_in(reach: Reach, window: int | None) -> Any:
    """Returns the function that says whether position i attends to j: before it, in its rows, within the window."""
    ends, places = reach
    if window is None:
        return lambda _b, _h, i, j: (j <= i) & (i < ends[j])
    text = str(window)

    def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < ends[j]) & (places[i] - places[j] < int(text))

    return visible


# All layers of a forward (and of its recomputation) come with the same tensor of bounds.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _block_mask(bounds: Tensor, length: int, window: int | None) -> Any:
    made = _masks.setdefault(bounds, {})
    if window not in made:
        reach = reach_of(bounds, length)
        made[window] = block_mask_of(reach, window, visible_in(reach, window))
    return made[window]
