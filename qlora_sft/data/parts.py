"""Take apart content that is a list of typed parts, in the dialects of OpenAI and Anthropic."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from qlora_sft.data.calls import read_call, read_id
from qlora_sft.data.code_parts import spelled
from qlora_sft.data.conversation import CodePart, ToolCall
from qlora_sft.data.values import EMPTY, idle_keys, joined, kind, only, short, without
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonList, JsonObject

_TEXT = ("value", "text")
_REASONING = ("value", "text", "reasoning", "thinking", "content")
_RESULT = ("value", "content", "text")
_CALL = ("value", "tool_call", "tool_use")
# image, image_url, input_image, images; video; audio, input_audio.
_MEDIA = re.compile(r"(^|_)(image|video|audio)(s|_url)?$")


class ContentParts:
    """Holds the parts of a content: ``text`` (None if there is none), ``reasoning``, ``calls``, and tool ``results``.

    A result is ``{content, tool_call_id?, name?}``. Typed parts carry their text under ``value`` or under their type's
    own name, as the various formats have it.
    """

    def __init__(self, content: object, role: str, unused: set[str]):
        self.text: str | None = content if isinstance(content, str) else None
        self.reasoning = ""
        self.calls: list[ToolCall] = []
        self.results: list[JsonObject] = []
        self.code: list[CodePart] = []
        """The text and the code in their order; empty if there is no code."""
        if isinstance(content, list) and not (role == "tool" and not _is_typed(content)):
            for part in content:
                self._add({"type": "text", "text": part} if isinstance(part, str) else part, role, unused)
        elif role == "tool" and isinstance(content, dict | list):
            # A result as the function returned it; the model will be shown its JSON.
            self.text = json.dumps(content, ensure_ascii=False)
        elif content is not None and not isinstance(content, str):
            raise DataError(f"'content' must be a text or a list of typed parts, got {kind(content)}")
        if all(part["type"] == "text" for part in self.code):
            self.code = []

    def _add(self, part: object, role: str, unused: set[str]) -> None:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise DataError(f"a part of 'content' needs a 'type' and a 'value', got {short(part)}")
        name = part["type"]
        if name == "text":
            if self.calls:
                raise DataError(
                    "text after a tool call in one message; a template writes calls last, so split it in two"
                )
            self._say({"type": "text", "text": _text_of(part, _TEXT, unused)})
        elif name in ("python", "python_output"):
            if role != "assistant" or self.calls:
                raise DataError(f"{name} belongs into an answer, before its tool calls; move it")
            code = _text_of(part, _TEXT, unused)
            self._say({"type": "python" if name == "python" else "python_output", "text": code})
        elif name in ("reasoning", "thinking"):
            if self.text or self.calls:
                raise DataError("reasoning after text or calls in one message; a template writes it first, so split it")
            self.reasoning += _text_of(part, _REASONING, unused)
        elif name in ("tool_call", "tool_use"):
            self.calls.append(_call(part, unused))
        elif name == "tool_result":
            if role not in ("user", "tool"):
                raise DataError(f"a tool result in a {role} message; put it into a message of its own, behind the call")
            self.results.append(_result(part, unused))
        else:
            refuse_media(name, f"a content part of type {name!r}")
            allowed = "text, reasoning, python, python_output, tool_call and tool_result"
            raise DataError(
                f"a content part of type {name!r} cannot be trained on, only {allowed}; remove it or the row"
            )

    def _say(self, part: CodePart) -> None:
        self.code.append(part)
        self.text = (self.text or "") + spelled([part])


def refuse_media(name: str, what: str) -> None:
    """Raises `DataError` if the type of a part, or a key, is that of images, sound or video; ``what`` names it."""
    if _MEDIA.search(name):
        raise DataError(
            f"{what}: only text is trained here, even for multimodal models, and the answer would be learned "
            "without it; remove the row, or say in words what the answer needs"
        )


def refuse_media_keys(fields: Mapping[str, object], known: set[str], what: str) -> None:
    """Raises `DataError` for a row or a message that brings images, sound or video under a key of its own.

    A text under such a key is no fault: it may be the address of something that no answer is about.
    """
    for key in fields.keys() - known:
        value = fields[key]
        listed = value[:1] in ("[", "{") and value != "[]" if isinstance(value, str) else value not in EMPTY
        if listed and not isinstance(value, int | float):
            refuse_media(key, f"{what} {key!r}")


def text_of_blocks(content: object, what: str, unused: set[str]) -> str:
    """Returns a text, or the joined texts of a list of text parts. Raises `DataError` for parts of another kind."""
    parts = ContentParts(content, "user", unused)
    if parts.reasoning or parts.calls or parts.results:
        raise DataError(f"{what} may hold texts only, got {short(content)}")
    return parts.text or ""


def _call(part: JsonObject, unused: set[str]) -> ToolCall:
    """Reads a call that is the part itself or stands in it under a key; its id may stand at either place."""
    inner = only(part, *_CALL)
    if inner is None:
        return read_call(without(part, {"type"}), unused)
    if isinstance(inner, dict):
        return read_call(joined(inner, without(part, {"type", *_CALL})), unused)
    unused |= idle_keys(part, {"type", "id", *_CALL}, "content part key")
    call = read_call(inner, unused)
    identity = read_id(part.get("id"), "the id of a tool call")
    if not identity:
        return call
    joined({"id": call.get("id")}, {"id": identity})  # which raises if they are two
    return {**call, "id": identity}


def _result(part: JsonObject, unused: set[str]) -> JsonObject:
    """Reads a result. Anthropic's is a text or a list of text blocks; any other value is shown as its JSON."""
    known = {"type", "tool_use_id", "tool_call_id", "name", *_RESULT}
    unused |= idle_keys(part, known, "content part key")
    given = next((part[key] for key in _RESULT if part.get(key) is not None), None)
    value = given if only(part, *_RESULT) is None else only(part, *_RESULT)
    if isinstance(value, list) and (_is_typed(value) or not value):
        value = text_of_blocks(value, "a tool result", unused)
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    identity = read_id(only(part, "tool_use_id", "tool_call_id"), "'tool_use_id'")
    name = part.get("name")
    if name not in EMPTY and not isinstance(name, str):
        raise DataError(f"'name' has the wrong type: {name!r}; it must be a text")
    return {"content": text, **({"tool_call_id": identity} if identity else {}), **({"name": name} if name else {})}


def _is_typed(content: JsonList) -> bool:
    return any(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)


def _text_of(part: JsonObject, keys: tuple[str, ...], unused: set[str]) -> str:
    unused |= idle_keys(part, {"type", *keys}, "content part key")
    text = only(part, *keys)
    if text is None:
        text = next((part[key] for key in keys if part.get(key) is not None), None)
    if not isinstance(text, str):
        raise DataError(f"a content part of type {part['type']!r} needs a text under 'value', got {short(part)}")
    return text
