"""Chooses how a GPU attends inside documents where it can do either: all in one call, or one call per document.

Forward and backward of one layer of Llama-3.1-8B (32 query and 8 key heads of 128) on an H200, torch 2.11, in ms::

    tokens x documents       8,192 x 16   32,768 x 16   8,192 x 4   32,768 x 4   8,192 x 1   32,768 x 1
    tokens of a document            512         2,048       2,048        8,192       8,192       32,768
    varlen, FlashAttention 2       2.08          8.61        3.20        26.46        7.59       100.42
    sdpa per document, cuDNN       2.43          7.65        2.45        16.19        4.19        53.36

The rows are in benchmarks/results/attention.jsonl. A rule and not a measurement at the start, so that a run that goes
on attends as it did before: both ways round differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from qlora_sft.model.attention import Way

# Between 512 tokens, where one call is faster, and 2,048, where one call per document is.
LONG = 1024
# cuDNN builds a plan for every new length, which takes longer than it saves; few lengths are soon all known.
FEW = 32
# The generation of GPUs on which cuDNN's kernel was measured.
MEASURED = (9, 0)


class AttentionChoice(NamedTuple):
    way: Way
    reason: str


def choose_way(
    wanted: Literal["auto", "varlen", "sdpa"], device: torch.device, lengths: Sequence[int]
) -> AttentionChoice:
    """Returns the way to attend for a run of documents with ``lengths`` tokens, and why."""
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


def typical_length(lengths: Sequence[int]) -> float:
    """Returns the length of the document that the average token stands in: attention costs by pairs of tokens."""
    total = sum(lengths)
    return sum(length * length for length in lengths) / total if total else 0.0
