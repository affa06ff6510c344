"""Compares the tokens that llama.cpp and the tokenizer make of the same text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def compare_texts(texts: Sequence[str], theirs: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns one fault if ids differ, which names the first place in the first such text; else no fault."""
    faults = []
    for text, ids in zip(texts, theirs, strict=True):
        ours = tokenizer.encode(text, add_special_tokens=False)
        if ours != ids:
            faults.append(_first_difference(text, ours, ids, tokenizer))
    if not faults:
        return []
    return [f"tokens: {len(faults)} of {len(texts)} texts differ; {faults[0]}. Suspect: the tokenizer in the GGUF"]


def _first_difference(text: str, ours: list[int], theirs: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    pairs = enumerate(zip_longest(ours, theirs))
    place = next(i for i, (a, b) in pairs if a != b)
    before = tokenizer.decode(ours[max(0, place - 4) : place])
    return f"after {before!r} the tokenizer has {ours[place : place + 3]}, llama.cpp {theirs[place : place + 3]}"
