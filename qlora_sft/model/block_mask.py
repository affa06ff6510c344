"""Builds FlexAttention's block mask from the bounds of the documents, or from the tree of prefixes, block by block.

torch's own `create_block_mask` asks about every pair of positions, for which it forms a matrix of T x T: 1 GiB and more
at 32,768 tokens. Blocks of 128 positions tell as much. Position i sees j iff ``j <= i < end of j``, where the end of a
position is that of its document, or of all that continues its segment of a tree, which stands depth first::

    block i sees block j      j = i, or j < i, and the first position of i is before the last end in j
    all of it                 j < i, and the last position of i is before the first end in j

With a window both ask for the nearest and the farthest places, too: how many tokens stand before them in their rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_sft.model.attention_tree import tree_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Positions that FlexAttention's kernel takes or skips together.
BLOCK = 128
# Families whose attention has sinks, which FlexAttention serves as it does capped logits.
WITH_SINKS = {"deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash"}


class Reach(NamedTuple):
    """Holds, for every position of a packed sequence, how far behind it others see it."""

    ends: Tensor
    """int32 [T]: the first position behind it that does not."""
    places: Tensor
    """int32 [T]: its place among those that see each other, by which a window is counted."""


def reach_of(bounds: Tensor, length: int) -> Reach:
    """Returns the reach of ``length`` positions; those behind all documents are like one more document."""
    tree = tree_of(bounds)
    if tree is None:
        places = torch.arange(length, dtype=torch.int32, device=bounds.device)
        document = torch.searchsorted(bounds[1:].contiguous(), places, right=True)
        return Reach(F.pad(bounds[1:], (0, 1), value=length)[document], places)
    filled = length - tree.bounds[-1]
    lengths = torch.tensor([*tree.lengths, filled])
    ends = torch.tensor([*tree.ends, length], dtype=torch.int32)
    offsets = torch.tensor([*tree.starts, 0]) - torch.tensor(tree.bounds)
    places = torch.arange(length) + offsets.repeat_interleave(lengths)
    return Reach(ends.repeat_interleave(lengths).to(bounds.device), places.int().to(bounds.device))


def block_mask_of(reach: Reach, window: int | None, visible: Any) -> Any:
    """Returns the `BlockMask` of positions [T] with this reach, where T is whole blocks.

    visible: what says of two positions in a block that is seen in part whether one sees the other.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends, places = (x.view(-1, BLOCK) for x in reach)
    number = torch.arange(len(ends), device=ends.device)
    first = number[:, None] * BLOCK
    before = number[:, None] > number[None, :]
    seen = before & (first < ends.amax(1)[None, :])
    whole = before & (first + BLOCK - 1 < ends.amin(1)[None, :])
    if window is not None:
        seen &= places.amin(1)[:, None] - places.amax(1)[None, :] < window
        whole &= places.amax(1)[:, None] - places.amin(1)[None, :] < window
    part = (seen & ~whole) | (number[:, None] == number[None, :])
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

    Each has the end of every position in int32, with a window its place, too, and for blocks seen in part and seen
    whole, by row and by column, how many there are and which. config: transformers' configuration of the language
    model.
    """
    if not needs_flex(config):
        return 0
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    blocks = -(-tokens // BLOCK)
    tensors = len(kinds) + ("sliding_attention" in kinds)
    return tensors * 4 * blocks * BLOCK + len(kinds) * 4 * 4 * blocks * (blocks + 1)
