"""Predicts for a plan how a GPU will attend inside documents: all in one call, or one call per document.

Forward and backward of one layer of Llama-3.1-8B (32 query and 8 key heads of 128) on an H200, torch 2.11, in ms::

    tokens x documents       8,192 x 16   32,768 x 16   8,192 x 4   32,768 x 4   8,192 x 1   32,768 x 1
    tokens of a document            512         2,048       2,048        8,192       8,192       32,768
    varlen, FlashAttention 2       2.08          8.61        3.20        26.46        7.59       100.42
    sdpa per document, cuDNN       2.43          7.65        2.45        16.19        4.19        53.36

The rows are in benchmarks/results/attention.jsonl. A run measures its own shape (`attention_measured`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from qlora_sft.model.attention import Way, choose_path, head_size_of
from qlora_sft.model.block_mask import needs_flex

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Between 512 tokens, where one call is faster, and 2,048, where one call per document is.
LONG = 1024
# cuDNN builds a plan for every new length, which takes longer than it saves; few lengths are soon all known.
FEW = 32
# The generation of GPUs on which cuDNN's kernel was measured.
MEASURED = (9, 0)


Wanted = Literal["auto"] | Way


class AttentionChoice(NamedTuple):
    way: Way
    reason: str


def choose_way(wanted: Wanted, device: torch.device, lengths: Sequence[int]) -> AttentionChoice:
    """Returns the way to attend for a run of documents with ``lengths`` tokens, as far as a rule can tell, and why."""
    if wanted != "auto":
        return AttentionChoice(wanted, f"model.attention={wanted}")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != MEASURED:
        return AttentionChoice("varlen", "")
    different = len(set(lengths))
    if different > FEW:
        return AttentionChoice("varlen", f"{different:,} different lengths, and cuDNN builds a plan for each")
    typical = typical_length(lengths)
    if typical >= LONG:
        return AttentionChoice(
            "sdpa", f"a token's document has {typical:,.0f} tokens on average; from {LONG:,} on it is faster"
        )
    return AttentionChoice("varlen", f"a token's document has {typical:,.0f} tokens on average, fewer than {LONG:,}")


class PlannedAttention(NamedTuple):
    """Says how a run will attend, before its model is there."""

    way: Way
    """What `use_document_attention` is told."""
    path: str
    one_by_one: bool
    """Whether documents are attended to one by one, and their results joined into a copy."""
    reason: str


def plan_attention(
    config: PretrainedConfig,
    wanted: Wanted,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int],
) -> PlannedAttention:
    """Returns how a run of documents with ``lengths`` tokens will attend in ``dtype`` on ``device``.

    config: transformers' configuration of the language model.
    """
    path = choose_path(device, dtype, head_size_of(config), needs_flex(config))
    way, reason = choose_way(wanted, device, lengths)
    if path.name != "varlen":
        return PlannedAttention(way, path.name, path.name == "sdpa", path.reason)
    return PlannedAttention(way, way, way == "sdpa", reason or path.reason)


def typical_length(lengths: Sequence[int]) -> float:
    """Returns the length of the document that the average token stands in: attention costs by pairs of tokens."""
    total = sum(lengths)
    return sum(length * length for length in lengths) / total if total else 0.0
