"""Find where the model begins to write a turn: behind the header, whatever the marks of a template say.

The generation prompt decides. It is what a runtime puts before the answer, so the model never has to write it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from qlora_sft.data.conversation import Message

PromptBefore = Callable[[bool], str]
"""Returns the conversation before the turn as the template writes it, with the generation prompt (True) or without."""

_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")
# The think block that a generation prompt may open behind its header.
_OPENER = re.compile(r"<think>\s*(</think>\s*)?$")
_OPENED = re.compile(r"<think>\s*$")
_CLOSED = re.compile(r"<think>\s*</think>\s*$")


def turn_start(text: str, start: int, end: int, message: Message, before: PromptBefore) -> int:
    """Returns the first character of ``text[start:end]``, the marked turn, that the model has to write.

    Some marks include the header (DeepSeek's), or a part of it (Qwen2.5's its newline), or the opening ``<think>`` in
    which the prompt ends.
    """
    content = message.get("content") or ""
    if content[:1].strip() and text.startswith(content, start) and not content.startswith("<think>"):
        return start
    behind = start if message.get("reasoning") else _behind_empty_thinking(text, start, end)
    if behind > start:
        return behind
    # A turn that begins with anything but its content may rightly do so; the prompt decides.
    prompt = before(True)
    if text.startswith(prompt) and start <= len(prompt) <= end:
        start = len(prompt)
    else:
        start = _behind_header(text, start, end, prompt, before(False))
    return start if message.get("reasoning") else _behind_empty_thinking(text, start, end)


def prompt_gap(text: str, start: int, before: PromptBefore) -> str:
    """Returns the end of the generation prompt that the text before the turn
    (``text[:start]``) lacks; usually nothing.

    It lacks an opened think block, too, if the block is empty there and closed.
    """
    prompt = before(True)
    if prompt.startswith(text[:start]):
        return prompt[start:]
    opened = _OPENED.search(prompt)
    return opened.group() if opened and _CLOSED.search(text[:start]) else ""


def _behind_header(text: str, start: int, end: int, prompt: str, without: str) -> int:
    """Returns ``start``, moved behind the part of the header that stands there.

    The template may write the turns before differently, so the header is looked for around ``start``.
    """
    written = prompt[len(without) :] if prompt.startswith(without) else ""
    for header in (written, _OPENER.sub("", written)):
        for place in range(start - len(header), start + 1):
            if header and place >= 0 and text.startswith(header, place) and place + len(header) <= end:
                return place + len(header)
    return start


def _behind_empty_thinking(text: str, start: int, end: int) -> int:
    empty = _EMPTY_THINKING.match(text, start, end)
    return empty.end() if empty else start
