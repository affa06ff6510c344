"""Refuse a chat that a template has already written into a ``text`` column, because all of it would be trained."""

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
# Formats in plain words, by how a question and the answer behind it begin: a text that merely mentions one is none.
_PLAIN = (
    (r"^#{2,3} (?:Instruction|Input|Human|User):?[ \t]*$", r"^#{2,3} (?:Response|Assistant):"),
    (r"\A\s*(?:Human|User|USER|Q|Question)\s*:", r"^\s*(?:Assistant|ASSISTANT|AI)\s*:"),
    (r"\bUSER: ", r"\bASSISTANT: "),
)
_ENDS = re.compile(r"(?:<\|(?:im_end|eot_id|end|endoftext|end_of_text|return)\|>|<end_of_turn>|<eos>|</s>)\s*$")


def _in_plain_words(text: str) -> bool:
    for question, answer in _PLAIN:
        asked = re.search(question, text, re.MULTILINE)
        if asked and re.compile(answer, re.MULTILINE).search(text, asked.end()):
            return True
    return False


def ends_a_turn(answer: str) -> bool:
    """Says whether the answer ends in some template's end-of-turn token; our template writes its own after it."""
    return _ENDS.search(answer) is not None


def refuse_rendered_chat(text: str) -> None:
    """Raises `DataError` for a text that begins as a chat template's does, or is in an old format that has no tokens.

    Every token of a plain text is trained, the user's included.
    """
    if _BEGINS.match(text) or _in_plain_words(text):
        raise DataError(
            f"the text is a chat that a template has written already ({text.strip()[:30]!r}...), and every token of it "
            "would be trained, the user's too; give it as messages, or set supervise: all if that is meant"
        )


def refuse_rendered_prompt(text: str, column: str) -> None:
    """Raises `DataError` for a prompt that contains its turns already, since the template
    would write a turn around them."""
    if _BEGINS.match(text):
        raise DataError(
            f"{column!r} is a prompt that a template has written already ({text.strip()[:30]!r}...), and another would "
            "be written around it; give the question alone, or messages"
        )
