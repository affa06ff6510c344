"""Check that everything that a conversation says is in its rendering, each part where it belongs.

A template that knows no tools or no reasoning leaves them out in silence, and the model would learn to answer without
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qlora_sft.data.conversation import Conversation, ToolCall, function_of
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject

if TYPE_CHECKING:
    from qlora_sft.data.template import Span

_OPENED = re.compile(r"<think>\s*$")
_CURE = "use one that knows it, e.g. model.chat_template=chatml-think"


def check_nothing_lost(conversation: Conversation, text: str, spans: list[Span]) -> None:
    """Raises `DataError` if something of the conversation is missing in its rendered ``text``.

    Every message must be in the text. An assistant turn must be in its own span, with all of its calls and their
    arguments. Names, descriptions and parameters of the tools must be there, too.
    """
    # A reasoning inside the content may begin in the prompt.
    of_message = {span.message: _opener(text, span.start) + text[span.start : span.end] for span in spans}
    for index, message in enumerate(conversation["messages"]):
        where = of_message.get(index, text)
        wanted = [("content", message.get("content") or "")]
        # A template leaves the reasoning of past turns out, at inference too.
        if message.get("reasoning") and not message.get("past"):
            wanted.append(("reasoning", message["reasoning"]))
        lost = next((key for key, value in wanted if not _holds(where, value)), None)
        if lost is None and not _holds_calls(where, message.get("tool_calls") or []):
            lost = "tool_calls"
        if lost:
            raise DataError(f"message {index} ({message['role']}): the chat template leaves out its {lost!r}; {_CURE}")
    for tool in conversation.get("tools") or []:
        _check_tool(function_of(tool), text)


def _opener(text: str, start: int) -> str:
    opened = _OPENED.search(text[max(0, start - 16) : start])
    return opened.group() if opened else ""


def _holds(text: str, value: str) -> bool:
    """Says whether the text contains ``value`` as it is or as JSON, as some templates write a tool's result."""
    value = value.strip()
    return value in text or any(spelling in text for spelling in _as_json(value))


def _as_json(value: str) -> Iterator[str]:
    inside = json.dumps(value, ensure_ascii=False)[1:-1]
    yield inside
    yield json.dumps(inside, ensure_ascii=False)[1:-1]
    yield json.dumps(value)[1:-1]


def _holds_calls(text: str, calls: list[ToolCall]) -> bool:
    """Says whether the text contains the names of all calls, in their order, and all arguments."""
    position = 0
    for call in calls:
        function = function_of(call)
        name = str(function["name"])
        found = text.find(name, position)
        if found < 0:
            return False
        position = found + len(name)
        arguments = function.get("arguments")
        if not all(_holds(text, leaf) for leaf in _leaves(arguments if isinstance(arguments, dict) else {})):
            return False
    return True


def _leaves(value: object) -> Iterator[str]:
    """Yields keys and values at any depth, as texts, without those that have several spellings (true, None)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _check_tool(function: Mapping[str, object], text: str) -> None:
    name, parameters = str(function.get("name", "")), function.get("parameters")
    if name not in text:
        raise DataError(f"the chat template leaves out the tool {name!r}; use model.chat_template=chatml-think")
    missing = next((word for word in _words(function.get("description")) if not _holds(text, word)), None)
    if missing is not None:
        raise DataError(f"the chat template leaves out the description of the tool {name!r}; {_CURE}")
    missing = next((key for key in _parameters(parameters) if not _holds(text, key)), None)
    if missing is not None:
        raise DataError(
            f"the chat template leaves out the parameter {missing!r} of the tool {name!r}; write its schema as an "
            "object with 'type' and 'properties', or use another template, e.g. model.chat_template=chatml-think"
        )


def _words(description: object) -> list[str]:
    return re.findall(r"\w+", description) if isinstance(description, str) else []


def _parameters(schema: object) -> list[str]:
    """Returns the names of the parameters; some files have them without a schema around them."""
    if not isinstance(schema, dict):
        return []
    properties = schema.get("properties")
    if isinstance(properties, dict):
        return [str(key) for key in properties]
    return [str(key) for key, value in schema.items() if isinstance(value, dict)] if "type" not in schema else []


def unwritten_keys(tools: list[JsonObject], text: str) -> set[str]:
    """Returns the keys of the tools, beside names, descriptions and parameters, that are not in the text."""
    return {
        key
        for tool in tools
        for fields in (tool, function_of(tool))
        for key, value in fields.items()
        if key not in ("type", "function", "name", "description", "parameters")
        and not (f'"{key}"' in text and all(_holds(text, leaf) for leaf in _leaves(value)))
    }
