"""Convert one message of a chat, as people write it, to the one shape that the rest of the package knows (`Message`).

Every fault is a `DataError` that names cause and cure but not file and line, which the caller knows.
"""

from __future__ import annotations

from difflib import get_close_matches

from qlora_sft.data.calls import read_calls, read_id
from qlora_sft.data.code_parts import without_beginning
from qlora_sft.data.conversation import Message, ToolCall, checked_message
from qlora_sft.data.parts import ContentParts, refuse_media_keys
from qlora_sft.data.thinking import has_lone_close, split_thinking
from qlora_sft.data.values import EMPTY, anything, idle_keys, joined, kind, only
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject

ROLES = ("system", "user", "assistant", "tool")
# OpenAI's newer name for the system prompt, and its older one for a tool's result.
_OTHER_ROLES = {"developer": "system", "function": "tool"}
_REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
# ms-swift's and others' names.
_TRAIN_KEYS = ("train", "loss", "trainable")
_WEIGHT_KEYS = ("weight", "loss_weight", "loss_scale")
_RESULT_KEYS = ("tool_call_id", "tool_use_id", "call_id", "tool_name")
MESSAGE_KEYS = {
    *("role", "content", "tool_calls", "function_call", "name"),
    *(*_REASONING_KEYS, *_TRAIN_KEYS, *_WEIGHT_KEYS, *_RESULT_KEYS),
}
BEGUN = "message key 'prefix': a turn that is only begun is not supervised, or its end would be learned"
# The weights that float32 still tells from zero and from infinity when they are multiplied and added up.
WEIGHTS = (1e-6, 1e6)


def read_message(message: object, unused: set[str], think_tags: bool = True) -> list[Message]:
    """Returns the message in our shape, or several if it carries tool results beside its text.

    think_tags: whether ``<think>`` in an answer is markup, and not a text like any other.

    Keys that hold something and mean nothing here are added to ``unused``. Raises `DataError`.
    """
    if not isinstance(message, dict):
        raise DataError(f"expected an object with 'role' and 'content', got {kind(message)}")
    if _is_plain(message):
        return [{"role": message["role"], "content": message["content"]}]
    role = _role(message.get("role"))
    refuse_media_keys(message, MESSAGE_KEYS, "message key")
    unused |= idle_keys(message, MESSAGE_KEYS, "message key") | _without_effect(message, role)
    parts = ContentParts(message.get("content"), role, unused)
    calls = [*read_calls(message.get("tool_calls"), unused), *parts.calls]
    older = anything(message.get("function_call"), "'function_call'")
    if older is not None:
        calls += read_calls([older], unused)
    if calls and role != "assistant":
        raise DataError(f"only an assistant may have tool_calls, this is a {role} message; check its role")
    content, reasoning = _reasoning(message, parts, role, think_tags)
    if role == "assistant" and message.get("prefix") is True:
        unused -= {"message key 'prefix'"}
        unused.add(BEGUN)
        message = {"train": False, **message}
    settings, identity = _settings(message), _identity(message) if role == "tool" else _name(message)
    of_results = identity if role == "tool" else {}
    result = [checked_message({"role": "tool", **joined(each, of_results), **settings}) for each in parts.results]
    if result and not content and not calls:
        if role != "tool" and identity:
            unused.add("message key 'name' of a message with nothing but tool results")
        return result
    _check_content(content, role, calls)
    fields: JsonObject = {"role": role, "content": content or "", **reasoning}
    fields |= {"tool_calls": calls} if calls else {}
    fields |= {"parts": without_beginning(parts.code, content or "")} if parts.code else {}
    return [*result, checked_message({**fields, **identity, **settings})]


def _is_plain(message: JsonObject) -> bool:
    """Says whether nothing needs converting. That holds for most messages of most files, at a fifth of the time."""
    content = message.get("content")
    plain = len(message) == 2 and message.get("role") in ROLES
    return plain and isinstance(content, str) and bool(content) and "think>" not in content


def _role(role: object) -> str:
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        close = get_close_matches(str(role), ROLES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(ROLES)}"
        raise DataError(f"unknown role {role!r}; {hint}")
    return str(role)


def _without_effect(message: JsonObject, role: str) -> set[str]:
    """Returns the known keys that have no effect on a message of this role."""
    idle = set() if role == "tool" else {key for key in _RESULT_KEYS if message.get(key) not in EMPTY}
    if role != "assistant":
        idle |= {key for key in _TRAIN_KEYS if message.get(key) is True}
        idle |= {key for key in _WEIGHT_KEYS if message.get(key)}
    return {f"message key {key!r} of a {role} message" for key in idle}


def _reasoning(
    message: JsonObject, parts: ContentParts, role: str, think_tags: bool
) -> tuple[str | None, dict[str, str]]:
    """Returns the content without its reasoning, and the reasoning, wherever it was written."""
    found: dict[str, str] = {}
    for key in _REASONING_KEYS:
        value = message.get(key)
        if value in EMPTY:
            continue
        if not isinstance(value, str):
            raise DataError(f"key {key!r} must be a text with the reasoning")
        found[f"key {key!r}"] = value
    content = parts.text
    if parts.reasoning:
        found["content parts"] = parts.reasoning
    # If the reasoning is given apart, a closing tag alone is a slip of the text and ends no reasoning.
    if role == "assistant" and content and think_tags and not (found and has_lone_close(content)):
        thought, content = split_thinking(content)
        if thought:
            found["<think> text"] = thought
    if found and role != "assistant":
        raise DataError(f"only an assistant may have reasoning, this is a {role} message; check its role")
    if len(set(found.values())) > 1:
        raise DataError(f"the reasoning is given twice, by {' and '.join(found)}; keep one")
    return content, {"reasoning": next(iter(found.values()))} if found else {}


def _check_content(content: str | None, role: str, calls: list[ToolCall]) -> None:
    if role == "tool":
        return  # a function may return nothing
    if content is None and not calls:
        raise DataError("'content' must be a text, got nothing; write it or remove the message")
    if role == "assistant" and not content and not calls:
        raise DataError("an assistant turn with neither content nor tool_calls; fill it in or remove the row")


def _identity(message: JsonObject) -> JsonObject:
    """Returns id and name of the call that a tool result belongs to."""
    identity = read_id(only(message, "tool_call_id", "tool_use_id", "call_id"), "'tool_call_id'")
    return {**_name({"name": only(message, "name", "tool_name")}), **({"tool_call_id": identity} if identity else {})}


def _name(message: JsonObject) -> JsonObject:
    name = message.get("name")
    if name in EMPTY:
        return {}
    if not isinstance(name, str):
        raise DataError(f"'name' has the wrong type: {name!r}; it must be a text")
    return {"name": name}


def _settings(message: JsonObject) -> JsonObject:
    """Returns ``train`` and ``weight``, checked, under whatever name they were given."""
    result: JsonObject = {}
    for ours, keys, kinds, wanted in (
        ("train", _TRAIN_KEYS, bool, "true or false"),
        ("weight", _WEIGHT_KEYS, int | float, "a number"),
    ):
        given = {key: message[key] for key in keys if message.get(key) is not None}
        for key, value in given.items():
            if not isinstance(value, kinds) or (ours == "weight" and isinstance(value, bool)):
                raise DataError(f"{key!r} has the wrong type: {value!r}; it must be {wanted}")
        if given:
            result[ours] = only(given, *keys)
    weight = result.get("weight", 0)
    assert isinstance(weight, int | float)
    if not (weight == 0 or WEIGHTS[0] <= weight <= WEIGHTS[1]):
        raise DataError(f"'weight' must not be negative or infinite (0 leaves it out, else 1e-6 to 1e6), got {weight}")
    return result
