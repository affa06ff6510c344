"""Give the reasoning of turns to a chat template where the template reads it: under a key, in the content, or not at
all."""

from __future__ import annotations

import re

from qlora_sft.data.conversation import Conversation, Message

# The names that families use for the reasoning of a turn.
KEYS = ("reasoning", "reasoning_content", "thinking")
_THINK = re.compile(r"</?think>")
# A message that is asked for one of them: m.thinking, m["thinking"], m.get("thinking"), "thinking" in m.
_NAMES = "|".join(KEYS)
_READS_KEY = re.compile(rf"""(\.|\[ *['"]|\( *['"])({_NAMES})\b|['"]({_NAMES})['"] +(not +)?in\b""")


def is_silent(conversation: Conversation) -> bool:
    """Says whether the conversation asks for answers without reasoning."""
    return (conversation.get("chat_template_kwargs") or {}).get("enable_thinking") is False


def without_silenced(conversation: Conversation) -> Conversation:
    """Returns the conversation without the reasoning of its turns if it asks for answers without any.

    Many templates read ``enable_thinking`` for the prompt alone, and would write the reasoning behind a prompt that
    asks for none.
    """
    if not is_silent(conversation) or not any(message.get("reasoning") for message in conversation["messages"]):
        return conversation
    return {**conversation, "messages": [_without_reasoning(message) for message in conversation["messages"]]}


def with_inline_reasoning(conversation: Conversation, template: str, opened: bool = False) -> Conversation:
    """Returns the conversation with every reasoning in its turn's content, where ``template`` reads it there and
    nowhere else (DeepSeek-R1-Distill's); itself if it has none.

    A template that has a key for it writes it in a form of its own, or leaves it out of earlier turns, and would write
    what is in the content beside that. opened: the template opens the think block before the content, as Nemotron Nano
    v2's.
    """
    thinks = any(message.get("reasoning") for message in conversation["messages"])
    if not thinks or not _THINK.search(template) or _READS_KEY.search(template):
        return conversation
    messages = []
    for message in conversation["messages"]:
        opener = "" if opened else "<think>\n"
        text = f"{opener}{message.get('reasoning')}\n</think>\n\n{message.get('content') or ''}"
        inline: Message = {**_without_reasoning(message), "content": text}
        messages.append(inline if message.get("reasoning") else message)
    return {**conversation, "messages": messages}


def _without_reasoning(message: Message) -> Message:
    changed: Message = {**message}
    changed.pop("reasoning", None)
    return changed
