"""Multiple choice by the model's own probabilities: which letter is likeliest as the beginning of the answer.

Nothing is generated, so a model that would say "The answer is B" is judged by what it holds for right; whether it
would have begun with the letter is counted beside (``said``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError
from qlora_sft.evaluation.generate import in_batches, pad_id
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.evaluation.prompt import answered
from qlora_sft.evaluation.tasks import LETTERS, Item
from qlora_sft.model.attention import plain_attention


def letter_prompts(items: Sequence[Item], tokenizer: Any, style: ChatFormat) -> tuple[list[list[int]], list[int]]:
    """(prompt ids of every item, the token of every letter as the beginning of an answer).

    Both come from conversations that are answered with a letter, as training would render them. Raises `DataError`.
    """
    prompts = [answered(item, "A", tokenizer, style)[0] for item in items]
    most = max(item.options for item in items)
    firsts = [answered(items[0], letter, tokenizer, style)[1][0] for letter in LETTERS[:most]]
    if len(set(firsts)) < len(firsts):
        raise DataError(
            f"{items[0].place}: answers with different letters begin with the same token, "
            f"{tokenizer.decode([firsts[0]])!r}, so choices cannot be told apart; the chat template writes it first"
        )
    return prompts, firsts


def choose(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    prompts: Sequence[list[int]],
    firsts: Sequence[int],
    dtype: torch.dtype,
    stops: Collection[int],
) -> list[tuple[str, bool]]:
    """For every item the likeliest letter, and whether it is the likeliest of all tokens."""
    letters = torch.tensor(firsts, device=model.device)

    def look(ids: Tensor, mask: Tensor) -> list[tuple[list[float], int]]:
        logits = next_logits(model, ids, mask)
        return list(zip(logits[:, letters].tolist(), logits.argmax(-1).tolist(), strict=True))

    with plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
        seen = in_batches(prompts, 0, pad_id(tokenizer, stops), model.device, look)
    chosen = []
    for item, (of_letters, anything) in zip(items, seen, strict=True):
        best = max(range(item.options), key=of_letters.__getitem__)
        chosen.append((LETTERS[best], anything == firsts[best]))
    return chosen


def next_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[rows, vocabulary] in float32: of the token after the last column of left-padded rows."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=False)
    return output.logits[:, -1].float()  # type: ignore[no-any-return]
