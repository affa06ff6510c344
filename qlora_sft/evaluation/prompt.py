"""A question as the model is given it: what training would have put before this answer.

Thinking templates write more into a prompt than the generation prompt of inference (Qwen3's an empty thought before an
answer without one), and by how the answer goes on. So a question is rendered with its answer, and cut before that. A
reference without reasoning is therefore asked for without reasoning; ``thinking: on`` asks otherwise.
"""

from __future__ import annotations

from typing import Any

from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.data.render import render_conversation, render_prompt
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError
from qlora_sft.evaluation.answers import prompts_of
from qlora_sft.evaluation.tasks import Item


def prompt_of(item: Item, thinking: str, tokenizer: Any, style: ChatFormat) -> list[int]:
    """Token ids; ``thinking: on`` and ``off`` ask in that mode, whatever the reference does.

    Raises `DataError` with file and line.
    """
    if thinking == "auto":
        try:
            return answered(item, None, tokenizer, style)[0]
        except DataError:
            pass  # some templates of model folders do not say which text is the answer; all have a generation prompt
    try:
        return render_prompt(item.conversation, tokenizer, style)
    except DataError as error:
        raise DataError(f"{item.place}: {error}") from None


def answered(item: Item, answer: str | None, tokenizer: Any, style: ChatFormat) -> tuple[list[int], list[int]]:
    """(prompt, answer) in token ids; default: the item's own answer."""
    message: Message = item.answer if answer is None else {"role": "assistant", "content": answer}
    conversation: Conversation = {**item.conversation, "messages": [*item.conversation["messages"], message]}
    try:
        prompt = prompts_of(render_conversation(conversation, tokenizer, chat_format=style, supervise="last"))[-1]
    except DataError as error:
        raise DataError(f"{item.place}: {error}") from None
    return prompt.input_ids, prompt.reference_ids
