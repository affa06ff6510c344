"""Find the control tokens that a chat template of the user's own writes, by rendering it and by reading its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.data.shipped import SHIPPED
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALL: Message = {
    "role": "assistant", "content": "", "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    ],
}  # fmt: skip
_ASKED: list[Message] = [{"role": "user", "content": "question"}]
_ANSWER: Message = {"role": "assistant", "content": "answer"}
_RESULT: Message = {"role": "tool", "content": "result", "name": "look", "tool_call_id": "abcdefghi"}
_LOOK: JsonObject = {
    "name": "look",
    "description": "looks",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}
_LONG: list[Message] = [{"role": "system", "content": "system"}, *_ASKED, _ANSWER, *_ASKED, _ANSWER]
# What a template may be shown: a system prompt, several turns, reasoning, tools with a call and its result.
_PROBES: list[Conversation] = [
    {"messages": [*_ASKED, _ANSWER]},
    {"messages": _LONG},
    {"messages": [*_ASKED, {**_ANSWER, "reasoning": "thought"}]},
    {"messages": [*_ASKED, _CALL, _RESULT, _ANSWER], "tools": [{"type": "function", "function": _LOOK}]},
]
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


@dataclass(frozen=True)
class WrittenTokens:
    """Holds the control tokens that a template writes, and the one that ends an assistant's turn (empty for none)."""

    control: tuple[str, ...]
    end: str


@lru_cache(maxsize=8)
def written_tokens(template: str) -> WrittenTokens:
    """Returns the control tokens of a template.

    They are marks in ``<|...|>``, as ``<|thinking|>``, and the control tokens of the shipped templates. Other tags
    (``<think>``) are taken for text, which any vocabulary spells.
    """
    texts = [*_renderings(template), _COMMENT.sub("", template)]
    found = dict.fromkeys(match for text in texts for match in _control().findall(text))
    behind = texts[0].rpartition("answer")[2]
    end = _control().match(behind.lstrip())
    return WrittenTokens(tuple(found), end.group() if end and len(texts) > 1 else "")


@lru_cache(maxsize=1)
def _control() -> re.Pattern[str]:
    known = sorted({token for shipped in SHIPPED.values() for token in shipped.control}, key=len, reverse=True)
    # What stands in quotes or braces between the strokes is a text that the template puts together.
    return re.compile("|".join([r"<\|[^\s<>|'\"{}]{1,60}\|>", r"<｜[^\s<>｜'\"{}]{1,60}｜>", *map(re.escape, known)]))


def _renderings(template: str) -> Iterator[str]:
    """Yields the template's text of every probe that it accepts, with and without a generation prompt."""
    from qlora_sft.data.template import apply

    # Empty, because the tokens that a tokenizer names are in its vocabulary.
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
    nameless = cast("PreTrainedTokenizerBase", SimpleNamespace(special_tokens_map=names))
    for probe in _PROBES:
        for thinking in (None, True, False):
            settings: JsonObject = {} if thinking is None else {"enable_thinking": thinking}
            asked: Conversation = {**probe, "chat_template_kwargs": settings}
            for prompt in (False, True):
                with suppress(DataError):
                    yield apply(asked, nameless, template, prompt=prompt)[0]
