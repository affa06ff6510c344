"""Hands texts to a chat template as typed parts, in the roles of which it writes no others.

Templates of some models that also see (SmolVLM's, LLaVA's) go through the parts of a content and write those of text. A
plain text has no parts, so nothing of it would be written. Where a template writes the content of another role as it
is, parts would become the Python or JSON text of a list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_sft.errors import DataError

_WORD, _KEY = "heliotrope", "amaranth"
# What a template raises: Jinja's own errors, and those of its expressions, which fail as Python's do.
FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def as_template_reads(messages: Sequence[Mapping[str, object]], template: str) -> list[Mapping[str, object]]:
    """Returns the messages, with the text of every role of which ``template`` writes nothing else as one part."""
    return [
        {**message, "content": [_part(message["content"])]}
        if isinstance(message.get("content"), str)
        and message["content"]
        and wants_parts(template, str(message["role"]))
        else message
        for message in messages
    ]


def check_no_lists(messages: Sequence[Mapping[str, object]], text: str) -> None:
    """Raises `DataError` if a rendered text has a part of one of the messages spelled as a Python or JSON object."""
    parts = [(message["role"], part) for message in messages for part in _parts(message)]
    for role, part in parts:
        for spelled in (str(part), json.dumps(part, ensure_ascii=False)):
            # A text that is about such objects may well have one.
            if spelled in text and not any(spelled in str(other["text"]) for _, other in parts):
                raise DataError(
                    f"the chat template writes a text of {role!r} as a list of parts, and another only in parts; use "
                    "another model.chat_template"
                )


def _parts(message: Mapping[str, object]) -> list[dict[str, object]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


@lru_cache(maxsize=64)
def wants_parts(template: str, role: str) -> bool:
    """Says whether ``template`` writes the text of a content of this role in parts, and not that of a plain one."""
    part = {**_part(_WORD), _KEY: ""}
    return not _writes(template, role, _WORD) and _writes(template, role, [part])


def _part(text: object) -> dict[str, object]:
    return {"type": "text", "text": text}


def _writes(template: str, role: str, content: object) -> bool:
    """Says whether the template writes the word of a content; the key beside it is only in the text of a list."""
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    try:
        texts, _ = render_jinja_template([_conversation(template, role, content)], chat_template=template, **tokens)
    except FAILURES:
        return False
    return _WORD in texts[0] and _KEY not in texts[0]


def _conversation(template: str, role: str, content: object) -> list[Mapping[str, object]]:
    """Returns a short conversation with one message of ``role``, where one of it usually stands."""
    asked: Mapping[str, object] = {"role": role, "content": content}
    if role == "user":
        return [asked]
    user = as_template_reads([{"role": "user", "content": "why?"}], template)
    if role in ("system", "developer"):
        return [asked, *user]
    if role != "tool":
        return [*user, asked]
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [*user, calling, {**asked, "name": "look", "tool_call_id": call["id"]}]
