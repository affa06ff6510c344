"""Find where the model begins to write a turn: behind the header, whatever the marks of a template say.

The generation prompt decides. It is what a runtime puts before the answer, so the model never has to write it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from qlora_sft.data.conversation import Message
from qlora_sft.errors import DataError

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


def header_end(until: str, before: PromptBefore, with_answer: Callable[[str], str]) -> int:
    """Returns where a turn begins whose generation prompt goes on behind the header of the turn; 0 if that is not so.

    Gemma 4's ends in an empty thought, which the template does not write before the answers of a conversation. The
    header is what stands before two different answers alike, and is a beginning of the prompt.

    until: the text up to the end of the turn. with_answer: returns it with another answer in place of the turn's.
    """
    one, other = with_answer("x"), with_answer("y")
    header = one[: next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)]
    new = header.startswith(before(False)) and header != before(False)
    return len(header) if new and before(True).startswith(header) and until.startswith(header) else 0


def opened_twice(text: str, start: int) -> bool:
    """Says whether the turn that begins at ``start`` opens a think block inside one."""
    return bool(_OPENED.search(text, 0, start)) and text.startswith("<think>", start)


def check_turn(number: int, text: str, start: int, end: int, stops: re.Pattern[str], before: PromptBefore) -> None:
    """Raises `DataError` for a turn ``text[start:end]`` that the model could not write as the text has it.

    An answer in a think block that nothing ends is a thought. What stands behind an end of turn and another header is
    never reached: Nemotron Nano v2's template writes a text and a call in such a way. number: of the message.
    """
    opened = _OPENED.search(text, 0, start)
    if opened and "</think>" not in text[start:end]:
        raise DataError(
            f"message {number}: the answer would stand in the think block that the template opens before it "
            f"({opened.group()!r}) and nothing ends. Give the turn its reasoning, ask for none as the template "
            "knows it (enable_thinking: false, or /no_think in the text), or use another model.chat_template"
        )
    for found in stops.finditer(text, start, end):
        stop, behind = found.group(), text[found.end() : end].lstrip()
        if behind and behind.startswith(_header(before)):
            raise DataError(
                f"message {number}: the chat template writes this turn as two, and generation stops behind the first, "
                f"at {stop!r}. Leave out its text or its calls, or use another model.chat_template"
            )


def _header(before: PromptBefore) -> str:
    """Returns what the generation prompt adds, without the think block that it may open; a line if it adds nothing."""
    prompt, without = before(True), before(False)
    return _OPENER.sub("", prompt.removeprefix(without)).strip() or "\n"


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
