"""Unroll a conversation into one per turn, for templates that write a turn differently when more turns follow.

Qwen3's own leaves out earlier reasoning; gpt-oss' also ends earlier answers in another token than the last. So no
single text shows every turn as the model will have to write it. One document per turn does: it holds what a runtime
shows the model before the turn, and the turn.
"""

from __future__ import annotations

from qlora_sft.data.conversation import Conversation, Message

PER_TURN = "rows rendered once per turn, as supervise: turns asks for"
UNROLLED = "rows rendered once per turn, because the chat template writes earlier turns differently"


def unrolled(conversation: Conversation, supervise: str) -> list[Conversation]:
    """Returns the conversation up to each turn that is trained, with all earlier turns marked as ``past``.

    The list is empty if that would not help: there is only one turn, or everything is to be trained.
    """
    messages = conversation.get("messages", [])
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(turns) < 2 or supervise == "all":
        return []
    wanted = [turn for turn in turns if messages[turn].get("train") is not False and messages[turn].get("weight") != 0]
    return [
        last_turn({**conversation, "messages": messages[: turn + 1]})
        for turn in (wanted if supervise == "assistant" else wanted[-1:] if wanted[-1:] == turns[-1:] else [])
    ]


def last_turn(conversation: Conversation) -> Conversation:
    """Returns the conversation with all turns but the last marked as ``past``."""
    *earlier, last = conversation["messages"]
    return {**conversation, "messages": [*map(_past, earlier), last]}


def _past(message: Message) -> Message:
    return {**message, "train": False, "past": True} if message["role"] == "assistant" else message
