"""Answers multiple choice by the model's own probabilities: which letter is likeliest to begin the answer.

Nothing is generated. So a model that would say "The answer is B" is graded by the letter that it prefers. Whether the
model would have begun with that letter is counted separately, as the metric ``said``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError
from qlora_sft.evaluation.generate import in_batches, pad_id
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.evaluation.no_numbers import no_numbers
from qlora_sft.evaluation.prompt import answered
from qlora_sft.evaluation.tasks import LETTERS, Item
from qlora_sft.model.attention import plain_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def letter_prompts(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> tuple[list[list[int]], list[int]]:
    """Returns the prompt ids of every item, and for every letter the token that begins an answer with it.

    Both come from conversations that are answered with a letter, as training would render them. Raises `DataError` if
    two letters begin with the same token.
    """
    prompts = [answered(item, "A", tokenizer, chat_format)[0] for item in items]
    most = max(item.options for item in items)
    firsts = [answered(items[0], letter, tokenizer, chat_format)[1][0] for letter in LETTERS[:most]]
    if len(set(firsts)) < len(firsts):
        raise DataError(
            f"{items[0].place}: answers with different letters begin with the same token, "
            f"{tokenizer.decode([firsts[0]])!r}, so choices cannot be told apart; the chat template writes it first"
        )
    return prompts, firsts


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    prompts: Sequence[list[int]],
    firsts: Sequence[int],
    dtype: torch.dtype,
    stop_token_ids: Collection[int],
) -> list[tuple[str, bool]]:
    """Returns for every item the likeliest letter, and whether that letter is the likeliest of all tokens."""
    letters = torch.tensor(firsts, device=model.device)

    def look(_: list[int], ids: Tensor, mask: Tensor) -> list[tuple[list[float], int]]:
        logits = next_logits(model, ids, mask)
        return list(zip(logits[:, letters].tolist(), logits.argmax(-1).tolist(), strict=True))

    with plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
        seen = in_batches(prompts, 0, pad_id(tokenizer, stop_token_ids), model.device, look, {})
    chosen = []
    for item, (of_letters, anything) in zip(items, seen, strict=True):
        best = max(range(item.options), key=of_letters.__getitem__)
        chosen.append((LETTERS[best], anything == firsts[best]))
    return chosen


def next_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Returns the float32 logits [rows, vocabulary] of the token that follows each of the left-padded rows.

    Raises `RunError` for a model that overflows.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=False)
    logits: Tensor = output.logits[:, -1].float()
    if logits.isnan().any():
        raise no_numbers()
    return logits
