"""One message of a chat, as people write it -> the one shape the rest of the package knows.

``{role, content: str, reasoning?, tool_calls?, name?, tool_call_id?, train?, weight?}``, with ``role`` one of `ROLES`
and every call ``{type: function, function: {name, arguments: dict}, id?}``. Every fault is a `DataError` that names
cause and cure but not file and line: the caller knows them.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any

from qlora_sft.data.misread import half_character, pythons_quotes
from qlora_sft.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# OpenAI's newer name for the system prompt, and its older one for a tool's result.
_OTHER_ROLES = {"developer": "system", "function": "tool"}
_REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
_KNOWN_KEYS = {
    *("role", "content", "tool_calls", "function_call", "name", "tool_call_id", "train", "weight", "loss_weight"),
    *_REASONING_KEYS,
}
_KNOWN_CALL_KEYS = {"id", "type", "function", "name", "arguments", "input", "index"}
_EMPTY: tuple[Any, ...] = (None, "", [], {})
# What float32 can tell from zero and from infinity when it is multiplied and added up.
WEIGHTS = (1e-6, 1e6)

Message = dict[str, Any]


def read_message(message: Any, unused: set[str]) -> list[Message]:
    """The message in our shape; several if it carries tool results beside its text.

    Keys that mean nothing here and hold something are added to ``unused``. Raises `DataError`.
    """
    if not isinstance(message, dict):
        raise DataError(f"expected an object with 'role' and 'content', got {kind(message)}")
    if _is_plain(message):
        return [{"role": message["role"], "content": message["content"]}]
    role = _role(message.get("role"))
    unused |= {f"message key {key!r}" for key in message.keys() - _KNOWN_KEYS if message[key] not in _EMPTY}
    parts = _Parts(message.get("content"), role, unused)
    calls = [*read_calls(message.get("tool_calls"), unused), *parts.calls]
    if message.get("function_call") is not None:
        calls += read_calls([message["function_call"]], unused)
    if calls and role != "assistant":
        raise DataError(f"only an assistant may have tool_calls, this is a {role} message; check its role")
    content, reasoning = _reasoning(message, parts, role)
    result = [{"role": "tool", "content": text, **_kept(message, "train", "weight")} for text in parts.results]
    if result and not content and not calls:
        return result
    _check_content(content, role, calls)
    kept = _kept(message, "name", "tool_call_id", "train", "weight")
    return [
        *result,
        {"role": role, "content": content or "", **reasoning, **({"tool_calls": calls} if calls else {}), **kept},
    ]


def split_thinking(content: str) -> tuple[str, str]:
    """``<think>reasoning</think>answer`` -> (reasoning, answer); ("", content) if it does not begin so.

    The line breaks around the tags belong to the template, which writes its own.
    """
    head = content.lstrip()
    if not head.startswith("<think>"):
        return "", content
    inside, closed, rest = head.removeprefix("<think>").partition("</think>")
    if not closed:
        raise DataError("the content opens <think> and never closes it; put </think> where the reasoning ends")
    return (inside.strip("\n") if inside.strip() else ""), rest.lstrip("\n")


def read_calls(calls: Any, unused: set[str]) -> list[dict[str, Any]]:
    """Tool calls, given as a list (or JSON text of one) of OpenAI calls or of bare ``{name, arguments}``."""
    if calls in (None, ""):
        return []
    calls = from_json_text(calls, "'tool_calls'")
    if not isinstance(calls, list) or not calls:
        raise DataError("'tool_calls' must be a list with at least one call; remove the key where there is none")
    return [_call(call, unused) for call in calls]


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """Tool descriptions, given as a list or as JSON text; bare functions get OpenAI's ``{type, function}`` around them,
    because that is how they arrive at inference."""
    if tools in _EMPTY:
        return []
    tools = from_json_text(tools, "'tools'")
    if not isinstance(tools, list):
        raise DataError(f"'tools' must be a list of functions or JSON text of one, got {kind(tools)}")
    result = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"each of 'tools' needs a function with a 'name', got {_short(tool)}")
        result.append(tool if "function" in tool else {"type": "function", "function": tool})
    return result


def from_json_text(value: Any, what: str) -> Any:
    """What the JSON text says (CSV and Parquet files hold lists that way); anything but a text as it is."""
    if not isinstance(value, str):
        return value
    try:
        content = json.loads(value)
    except json.JSONDecodeError as error:
        why = pythons_quotes(value) or f"{error.msg} at column {error.colno}"
        raise DataError(f"{what} is not valid JSON ({why}): {_short(value)}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{what} is not valid JSON (nested too deep, or a number without end)") from None
    if broken := half_character(content) if "\\ud" in value.lower() else None:
        raise DataError(f"{what} holds {broken}")
    return content


def kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _is_plain(message: Message) -> bool:
    """Nothing to do: most messages of most files, at a fifth of the time."""
    content: Any = message.get("content")
    plain = len(message) == 2 and message.get("role") in ROLES and isinstance(content, str) and content
    return bool(plain) and "<think>" not in content


class _Parts:
    """Content, taken apart: ``text`` (None if there is none), ``reasoning``, ``calls``, and tool ``results``.

    Typed parts carry their text under ``value`` or under their type's own name, as the various formats have it.
    """

    def __init__(self, content: Any, role: str, unused: set[str]):
        self.text: str | None = content if isinstance(content, str) else None
        self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.results: list[str] = []
        if isinstance(content, list) and not (role == "tool" and not _is_typed(content)):
            for part in content:
                self._add({"type": "text", "text": part} if isinstance(part, str) else part, unused)
        elif role == "tool" and isinstance(content, dict | list):
            # A result as the function returned it; the model will be shown its JSON.
            self.text = json.dumps(content, ensure_ascii=False)
        elif content is not None and not isinstance(content, str):
            raise DataError(f"'content' must be a text or a list of typed parts, got {kind(content)}")

    def _add(self, part: Any, unused: set[str]) -> None:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise DataError(f"a part of 'content' needs a 'type' and a 'value', got {_short(part)}")
        name = part["type"]
        if name == "text":
            if self.calls:
                raise DataError(
                    "text after a tool call in one message; a template writes calls last, so split it in two"
                )
            self.text = (self.text or "") + _text_of(part, "value", "text")
        elif name in ("reasoning", "thinking"):
            if self.text or self.calls:
                raise DataError("reasoning after text or calls in one message; a template writes it first, so split it")
            self.reasoning += _text_of(part, "value", "text", name, "content")
        elif name in ("tool_call", "tool_use"):
            self.calls += read_calls([_first(part, "value", "tool_call", "function") or part], unused)
        elif name == "tool_result":
            result = _first(part, "value", "content", "text")
            self.results.append(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))
        else:
            allowed = "text, reasoning, tool_call and tool_result"
            raise DataError(
                f"a content part of type {name!r} cannot be trained on, only {allowed}; remove it or the row"
            )


def _is_typed(content: list[Any]) -> bool:
    return any(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)


def _first(part: dict[str, Any], *keys: str) -> Any:
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _text_of(part: dict[str, Any], *keys: str) -> str:
    text = _first(part, *keys)
    if not isinstance(text, str):
        raise DataError(f"a content part of type {part['type']!r} needs a text under 'value', got {_short(part)}")
    return text


def _role(role: Any) -> str:
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        close = get_close_matches(str(role), ROLES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(ROLES)}"
        raise DataError(f"unknown role {role!r}; {hint}")
    return str(role)


def _reasoning(message: Message, parts: _Parts, role: str) -> tuple[str | None, dict[str, str]]:
    """Content without its reasoning, and the reasoning, wherever it was written."""
    found = {f"key {key!r}": message[key] for key in _REASONING_KEYS if message.get(key) not in _EMPTY}
    wrong = [key for key, value in found.items() if not isinstance(value, str)]
    if wrong:
        raise DataError(f"{wrong[0]} must be a text with the reasoning")
    content = parts.text
    if parts.reasoning:
        found["content parts"] = parts.reasoning
    if role == "assistant" and content:
        thought, content = split_thinking(content)
        if thought:
            found["<think> text"] = thought
    if found and role != "assistant":
        raise DataError(f"only an assistant may have reasoning, this is a {role} message; check its role")
    if len(set(found.values())) > 1:
        raise DataError(f"the reasoning is given twice, by {' and '.join(found)}; keep one")
    return content, {"reasoning": next(iter(found.values()))} if found else {}


def _check_content(content: str | None, role: str, calls: list[Any]) -> None:
    if content is None and not calls:
        raise DataError("'content' must be a text, got nothing; write it or remove the message")
    if role == "assistant" and not content and not calls:
        raise DataError("an assistant turn with neither content nor tool_calls; fill it in or remove the row")


def _kept(message: Message, *keys: str) -> dict[str, Any]:
    """Those of the optional keys that are set, checked; ``loss_weight`` is another name of ``weight``."""
    if message.get("weight") is None and message.get("loss_weight") is not None:
        message = {**message, "weight": message["loss_weight"]}
    kinds: dict[str, Any] = {"name": str, "tool_call_id": str, "train": bool, "weight": int | float}
    result = {key: message[key] for key in keys if message.get(key) is not None}
    for key, value in result.items():
        if not isinstance(value, kinds[key]) or (key == "weight" and isinstance(value, bool)):
            wanted = {"train": "true or false", "weight": "a number"}.get(key, "a text")
            raise DataError(f"{key!r} has the wrong type: {value!r}; it must be {wanted}")
    weight = result.get("weight", 0)
    if not (weight == 0 or WEIGHTS[0] <= weight <= WEIGHTS[1]):
        raise DataError(f"'weight' must not be negative or infinite (0 leaves it out, else 1e-6 to 1e6), got {weight}")
    return result


def _call(call: Any, unused: set[str]) -> dict[str, Any]:
    call = from_json_text(call, "a tool call")
    function = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool call needs a function with a 'name' and 'arguments', got {_short(call)}")
    unused |= {f"tool call key {key!r}" for key in {*call, *function} - _KNOWN_CALL_KEYS}
    name = function["name"]
    arguments = function.get("arguments", function.get("input"))
    if isinstance(arguments, str):
        # OpenAI sends an empty text for a function without parameters.
        arguments = from_json_text(arguments, f"the arguments of {name!r}: the text") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments of {name!r} must be an object or JSON text of one, got {kind(arguments)}")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
