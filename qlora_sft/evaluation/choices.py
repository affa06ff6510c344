"""Multiple choice by the model's own probabilities: which letter is likeliest as the beginning of the answer.

Nothing is generated, so a model that would say "The answer is B" is judged by what it holds for right; whether it
would have begun with the letter is counted beside (``said``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_sft.data.render import render_conversation
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError
from qlora_sft.evaluation.answers import prompts_of
from qlora_sft.evaluation.generate import batches, left_padded, pad_id
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.evaluation.tasks import LETTERS, Item
from qlora_sft.model.attention import plain_attention


def letter_prompts(items: Sequence[Item], tokenizer: Any, style: ChatFormat) -> tuple[list[list[int]], list[int]]:
    """(prompt ids of every item, the token of every letter as the beginning of an answer).

    Both come from conversations that are answered with a letter, as training would render them.
    """
    prompts = [_answered(item, "A", tokenizer, style)[0] for item in items]
    most = max(item.options for item in items)
    firsts = [_answered(items[0], letter, tokenizer, style)[1][0] for letter in LETTERS[:most]]
    if len(set(firsts)) < len(firsts):
        raise DataError("two letters begin with the same token of this tokenizer, so choices cannot be told apart")
    return prompts, firsts


def _answered(item: Item, letter: str, tokenizer: Any, style: ChatFormat) -> tuple[list[int], list[int]]:
    messages = [*item.conversation["messages"], {"role": "assistant", "content": letter}]
    rendered = render_conversation({**item.conversation, "messages": messages}, tokenizer, style=style)
    prompt = prompts_of(rendered)[-1]
    return prompt.input_ids, prompt.reference_ids


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
    chosen: dict[int, tuple[str, bool]] = {}
    letters = torch.tensor(firsts, device=model.device)
    with plain_attention(model), torch.no_grad(), autocast(model.device, dtype):
        for part in batches(prompts):
            ids, mask = left_padded([prompts[i] for i in part], pad_id(tokenizer, stops), model.device)
            logits = next_logits(model, ids, mask)
            anything = logits.argmax(-1).tolist()
            for row, i in enumerate(part):
                best = int(logits[row, letters[: items[i].options]].argmax())
                chosen[i] = (LETTERS[best], anything[row] == firsts[best])
    return [chosen[i] for i in range(len(items))]


def next_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[rows, vocabulary] in float32: of the token after the last column of left-padded rows."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    return output.logits[:, -1].float()  # type: ignore[no-any-return]
