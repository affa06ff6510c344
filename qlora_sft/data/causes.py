"""Find out why little, or nearly all, of a source is supervised: what its rows consist of, measured in characters."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from qlora_sft.data.conversation import Conversation, Message

_LARGE = 0.15
# Somebody else's turn inside an answer, as other formats write it.
_TURN = re.compile(r"^\W*(?:human|user|question|instruction|input)\W*:", re.IGNORECASE | re.MULTILINE)
# A shorter prompt is in many an answer by chance.
_LEAST_REPEATED = 20


@dataclass
class Told:
    """Counts the characters of some rows by who says them, and the rows and turns behind the counts."""

    rows: int = 0
    characters: Counter[str] = field(default_factory=Counter)
    with_tools: int = 0
    tool_lists: set[int] = field(default_factory=set)
    """Hashes of the different lists of tools."""
    turns: int = 0
    masked_turns: int = 0
    without_prompt: int = 0
    repeating: int = 0
    """Rows of which an answer has the prompt in it, word for word."""
    dialogues: int = 0
    """Rows of which an answer has other people's turns in it."""

    @classmethod
    def of(cls, rows: Iterable[Conversation], supervise: str) -> Told:
        """Counts ``rows`` of a source that is supervised as ``supervise`` says."""
        told = cls()
        for row in rows:
            told.rows += 1
            if tools := row.get("tools"):
                schemas = json.dumps(tools)
                told.with_tools += 1
                told.tool_lists.add(hash(schemas))
                told.characters["tools"] += len(schemas)
            turns = [message for message in row.get("messages", []) if message["role"] == "assistant"]
            masked = [turn for turn in turns if _is_masked(turn) or (supervise == "last" and turn is not turns[-1])]
            prompts = [
                m["content"] for m in row.get("messages", []) if m["role"] != "assistant" and m["content"].strip()
            ]
            long = [prompt.strip() for prompt in prompts if len(prompt.strip()) >= _LEAST_REPEATED]
            told.without_prompt += not prompts
            told.repeating += any(prompt in turn["content"] for turn in turns for prompt in long)
            told.dialogues += any(_TURN.search(turn["content"]) for turn in turns)
            told.turns += len(turns)
            told.masked_turns += len(masked)
            for message in row.get("messages", []):
                silent = any(message is turn for turn in masked)
                told.characters["masked" if silent else message["role"]] += _length(message)
        return told


def why_little(told: Told) -> str:
    """Returns the parts of the rows that are large and not supervised, the largest first, as text."""
    total = sum(told.characters.values()) or 1
    said = {
        "system": "system prompts",
        "user": "long prompts",
        "tool": "tool results",
        "tools": f"tool schemas ({told.with_tools:,} of {told.rows:,} rows have one of {len(told.tool_lists):,} lists)",
        "masked": f"masked answers ({told.masked_turns:,} of {told.turns:,} assistant turns: train: false, weight: 0, "
        "supervise: last)",
    }
    large = [
        f"{said[part]}, {count / total:.0%} of the characters"
        for part, count in told.characters.most_common()
        if part in said and count >= _LARGE * total
    ]
    looked = f" (in {told.rows:,} rows)" if told.rows else ""
    return ("; ".join(large) or "short answers beside what the chat template writes around every turn") + looked


def why_much(told: Told) -> str:
    """Returns what the rows have that leaves next to nothing to be masked, as text with counts."""
    causes = {
        "have answers that repeat the prompt": told.repeating,
        "have answers with other turns in them (User: ...), which should be messages": told.dialogues,
        "have no prompt": told.without_prompt,
    }
    found = [f"{count:,} of {told.rows:,} rows {what}" for what, count in causes.items() if count >= _LARGE * told.rows]
    answers = told.characters["assistant"]
    prompts = told.characters.total() - answers - told.characters["masked"]
    of_a_row = f"{prompts // max(1, told.rows):,} characters a row beside {answers // max(1, told.rows):,} of answers"
    return "; ".join([*found, f"short prompts, {of_a_row}, as stories and articles have them"])


def _is_masked(turn: Message) -> bool:
    return turn.get("train") is False or turn.get("weight") == 0


def _length(message: Message) -> int:
    calls = message.get("tool_calls")
    return len(message["content"]) + len(message.get("reasoning", "")) + (len(json.dumps(calls)) if calls else 0)
