"""Renders a question as a runtime shows it to the model, and as training would have rendered it before this answer.

Earlier turns stand there as the exported template writes them. Those of many families leave out the reasoning of
earlier turns, which a training version of the template may keep.

Some templates write more before an answer than the generation prompt of inference, and what they write depends on the
answer. Qwen3's, for example, writes an empty thought before an answer without reasoning. So a question is rendered with
its answer and cut before the answer. A question whose reference has no reasoning is therefore asked without reasoning,
unless ``thinking: on`` is set.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.data.render import render_conversation, render_prompt
from qlora_sft.data.template import ChatFormat, as_prompted
from qlora_sft.data.unroll import last_turn
from qlora_sft.errors import DataError
from qlora_sft.evaluation.answers import prompts_of
from qlora_sft.evaluation.tasks import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_of(item: Item, thinking: str, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> list[int]:
    """Returns the token ids of a question. ``thinking`` on or off asks in that mode, whatever the reference.

    Raises `DataError` with file and line.
    """
    if thinking == "auto":
        try:
            return answered(item, None, tokenizer, chat_format)[0]
        except DataError:
            pass  # Some templates do not say which text is the answer, but every template has a generation prompt.
    try:
        return render_prompt(item.conversation, tokenizer, as_prompted(chat_format))
    except DataError as error:
        raise DataError(f"{item.place}: {error}") from None


def answered(
    item: Item, answer: str | None, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> tuple[list[int], list[int]]:
    """Returns the token ids of prompt and answer. The default of ``answer`` is the item's own."""
    message: Message = item.answer if answer is None else {"role": "assistant", "content": answer}
    conversation: Conversation = {**item.conversation, "messages": [*item.conversation["messages"], message]}
    if chat_format.original is not None:
        # Where the runtime's template does not tell which text is the answer, its training version does.
        with suppress(DataError):
            return _last_turn(last_turn(conversation), tokenizer, as_prompted(chat_format))
    try:
        return _last_turn(conversation, tokenizer, chat_format)
    except DataError as error:
        raise DataError(f"{item.place}: {error}") from None


def _last_turn(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> tuple[list[int], list[int]]:
    """Returns the token ids of the last turn's prompt, and those of the turn."""
    prompt = prompts_of(render_conversation(conversation, tokenizer, chat_format=chat_format, supervise="last"))[-1]
    return prompt.input_ids, prompt.reference_ids
