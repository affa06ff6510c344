"""Split the reasoning from the answer that it begins."""

from __future__ import annotations

import re

from qlora_sft.errors import DataError

PLAIN_TEXT = "think_tags: text (of the source) keeps such tags as text"


def has_lone_close(content: str) -> bool:
    """Says whether a ``</think>`` stands behind some text, and no ``<think>`` before it."""
    before, closed, _ = content.partition("</think>")
    return bool(closed and before.strip()) and "<think>" not in before


def split_thinking(content: str) -> tuple[str, str]:
    """Splits ``<think>reasoning</think>answer`` into both; returns ("", content) if it does not begin so.

    ``reasoning</think>answer`` is read in the same way: where a generation prompt ends in ``<think>``, servers return
    what follows it. The line breaks around the tags belong to the template, which writes its own. Raises `DataError`
    for a tag without its other half.
    """
    before, closed, rest = content.partition("</think>")
    opened, opener, inside = before.partition("<think>")
    if not closed:
        if content.lstrip().startswith("<think>"):
            raise DataError(
                f"the content opens <think> and never closes it; put </think> where the reasoning ends ({PLAIN_TEXT})"
            )
        return "", content
    if "</think>" in rest.partition("<think>")[0]:
        raise DataError(f"the content closes </think> twice; remove one, or {PLAIN_TEXT}")
    if opener and opened.strip():
        return "", content  # a pair inside the answer
    if not opener:
        inside = opened
        # A server ends the reasoning with a line break. In the middle of a line the text may be about the tag itself.
        if not (re.search(r"(^|\n)[ \t]*$", before) or re.match(r"[ \t]*(\n|$)", rest)):
            raise DataError(f"the content has a </think> that no <think> opened; open it, or {PLAIN_TEXT}")
    return (inside.strip("\n") if inside.strip() else ""), rest.lstrip("\n")
