"""Hands texts to a chat template as typed parts, if it writes no others.

Templates of some models that also see (SmolVLM's, LLaVA's) go through the parts of a content and write those of text. A
plain text has no parts, so nothing of it would be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

_WORD = "heliotrope"
# What a template raises: Jinja's own errors, and those of its expressions, which fail as Python's do.
FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def as_template_reads(messages: Sequence[Mapping[str, object]], template: str) -> list[Mapping[str, object]]:
    """Returns the messages, with every text as a list of one part if ``template`` writes nothing else."""
    if not wants_parts(template):
        return list(messages)
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str) and message["content"]
        else message
        for message in messages
    ]


@lru_cache(maxsize=16)
def wants_parts(template: str) -> bool:
    """Says whether ``template`` writes the text of a content in parts, and not that of a plain one."""
    return not _writes(template, _WORD) and _writes(template, [{"type": "text", "text": _WORD}])


def _writes(template: str, content: object) -> bool:
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    try:
        texts, _ = render_jinja_template([[{"role": "user", "content": content}]], chat_template=template, **tokens)
    except FAILURES:
        return False
    return _WORD in texts[0]
