"""A chat that somebody's template has already written into a ``text`` column, which would be trained whole."""

from __future__ import annotations

import re

from qlora_sft.errors import DataError

# How the text begins, what a template may put before it aside, and what an answer begins with.
_BEGINNINGS = (
    r"<\|im_start\|>\s*(?:system|user|assistant|tool|developer)\b",
    r"<\|start_header_id\|>\s*\w+\s*<\|end_header_id\|>",
    r"<\|header_start\|>\s*\w+\s*<\|header_end\|>",
    r"<start_of_turn>\s*(?:user|model)\b",
    r"<\|turn>\s*\w+",
    r"<\|start\|>\s*(?:system|developer|user|assistant)\b",
    r"<\|(?:system|user|assistant)\|>",
    r"<｜(?:User|Assistant)｜>",
    r"<\|START_OF_TURN_TOKEN\|>",
    r"<\|(?:start_of_role|role_start)\|>",
    r"\[(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]",
    r"\[gMASK\]",
)
_BOS = r"(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|<BOS_TOKEN>|<\|endoftext\|>)"
_BEGINS = re.compile(rf"\s*(?:{_BOS}\s*)*(?:{'|'.join(_BEGINNINGS)})")
# Formats in plain words: a text that merely mentions one of them is none.
_PLAIN = (
    re.compile(
        r"^\s*(?:.*\n)*?#{2,3} (?:Instruction|Input|Human|User):?[ \t]*\n(?:.*\n)*?#{2,3} (?:Response|Assistant):"
    ),
    re.compile(r"^\s*(?:Human|User|USER|Q|Question)\s*:.*?\n\s*(?:Assistant|ASSISTANT|AI)\s*:", re.DOTALL),
    re.compile(r"\bUSER: .*?\bASSISTANT: ", re.DOTALL),
)


def refuse_rendered_chat(text: str) -> None:
    """Raises `DataError` for a text that begins as a chat template's does, or is in one of the old formats that have no
    tokens: of a plain text every token is trained, the user's too."""
    if _BEGINS.match(text) or any(plain.search(text) for plain in _PLAIN):
        raise DataError(
            f"the text is a chat that a template has written already ({text.strip()[:30]!r}...), and every token of it "
            "would be trained, the user's too; give it as messages, or set supervise: all if that is meant"
        )


def refuse_rendered_prompt(text: str, column: str) -> None:
    """Raises `DataError` for a prompt with its turns already in it: the template would write a turn around them."""
    if _BEGINS.match(text):
        raise DataError(
            f"{column!r} is a prompt that a template has written already ({text.strip()[:30]!r}...), and another would "
            "be written around it; give the question alone, or messages"
        )
