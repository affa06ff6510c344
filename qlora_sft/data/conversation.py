"""Define the one shape of a conversation that every reader produces and the renderer consumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Required, TypedDict, cast

from qlora_sft.json_types import JsonObject


class FunctionCall(TypedDict):
    """Names a function and the arguments that it is called with."""

    name: str
    arguments: JsonObject


class ToolCall(TypedDict, total=False):
    """Holds one tool call in OpenAI's form; ``id`` is absent where the data gives none."""

    id: str
    type: Required[str]
    function: Required[FunctionCall]


class CodePart(TypedDict):
    """Holds one part of an answer that runs code: text, code, or what came out of it (see `code_parts`)."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(TypedDict, total=False):
    """Holds one message of a chat."""

    role: Required[str]
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: Required[str]
    reasoning: str
    """What an assistant thinks before its content."""
    parts: list[CodePart]
    """What ``content`` is made of, if an assistant runs code in it."""
    tool_calls: list[ToolCall]
    name: str
    tool_call_id: str
    """The call that a tool message answers."""
    train: bool
    """False if the turn is not supervised."""
    weight: float
    """Factor on the loss of the turn."""
    past: bool
    """True for an assistant turn that is only context (see `unroll`)."""


class Conversation(TypedDict, total=False):
    """Holds one row: either ``messages`` or, for plain text, ``text``."""

    messages: list[Message]
    tools: list[JsonObject]
    chat_template_kwargs: JsonObject
    paired: bool
    """True once every tool result stands behind its call."""
    text: str
    file: str
    """Where the row came from; empty for a conversation that was not read from a source."""
    line: int
    """Line of the row, or its number in files without lines."""
    undesired: bool
    """True for an answer that its row marks as not wanted (KTO's ``label: false``); it is not trained on."""
    whole: bool
    """True where duplicates are looked for and its source trains all of its tokens (``supervise: all``)."""
    notes: list[str]
    """Remarkable facts about the row that are not faults."""


def checked_message(fields: JsonObject) -> Message:
    """Returns ``fields`` as a message; the caller has checked every key."""
    return cast(Message, fields)


def function_of(described: Mapping[str, object]) -> Mapping[str, object]:
    """Returns the ``function`` of a tool call or a tool description, or the whole where it has none around it."""
    function = described.get("function", described)
    return function if isinstance(function, Mapping) else {}
