"""Builds FlexAttention's block mask from the bounds of the documents, block by block.

torch's own `create_block_mask` asks about every pair of positions, for which it forms a matrix of T x T: 1 GiB and more
at 32,768 tokens. Blocks of 128 positions tell as much::

    block i sees block j      j = i, or j < i, the last document of j is the first of i, and their closest positions
                              are within the window
    all of it                 j < i, both hold one and the same document, and their farthest positions are within it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Positions that FlexAttention's kernel takes or skips together.
BLOCK = 128
# Families whose attention has sinks, which FlexAttention serves as it does capped logits.
WITH_SINKS = {"gpt_oss"}


def documents_of(bounds: Tensor, length: int) -> Tensor:
    """Returns the number of the document that each of ``length`` positions is in; those behind all have one more."""
    return torch.searchsorted(bounds[1:].contiguous(), torch.arange(length, device=bounds.device), right=True)


def block_mask_of(document: Tensor, window: int | None, visible: Any) -> Any:
    """Returns the `BlockMask` of the positions whose documents ``document`` [T] has, where T is whole blocks.

    visible: what says of two positions in a block that is seen in part whether one sees the other.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first, last = document[::BLOCK], document[BLOCK - 1 :: BLOCK]
    number = torch.arange(len(first), device=document.device)
    behind = number[:, None] - number[None, :]
    seen = (behind > 0) & (first[:, None] == last[None, :])
    whole = seen & (first[None, :] == last[None, :]) & (first[:, None] == last[:, None])
    if window is not None:
        seen &= (behind - 1) * BLOCK + 1 < window
        whole &= (behind + 1) * BLOCK - 1 < window
    part = (seen & ~whole) | (behind == 0)
    return BlockMask.from_kv_blocks(*_ordered(part), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=visible)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many blocks each row of ``blocks`` [N, N] has, [1, 1, N], and their numbers before all others."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None]


def needs_flex(config: PretrainedConfig) -> bool:
    """Says whether a model caps the logits of its attention or has sinks, which FlashAttention lacks."""
    return getattr(config, "attn_logit_softcapping", None) is not None or config.model_type in WITH_SINKS


def block_mask_bytes(config: PretrainedConfig, tokens: int) -> int:
    """Returns the bytes of all block masks of a model that needs FlexAttention, 0 for any other.

    Each has the document of every position in int64, and for blocks seen in part and seen whole, by row and by column,
    how many there are and which. config: transformers' configuration of the language model.
    """
    if not needs_flex(config):
        return 0
    kinds = len(set(getattr(config, "layer_types", None) or ["full_attention"]))
    blocks = -(-tokens // BLOCK)
    return kinds * (8 * blocks * BLOCK + 4 * 4 * blocks * (blocks + 1))
