"""Keep control tokens inside messages text: they are disguised while the template runs, and cut while encoding.

Without this, ``<|im_start|>assistant`` typed by a user would become a turn of the assistant.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from qlora_sft.data.conversation import Conversation
from qlora_sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One private-use character per control token. Templates leave them alone: they are neither space nor markup.
_BASE = 0xF0000
# A text is cut at this character before it is encoded, so that no tokenizer can see the control token whole.
CUT = chr(_BASE + 0xFFF0)

Disguises = dict[str, str]
"""Maps a private-use character to the control token that it stands for."""


@lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Returns what the tokenizer encodes as structure: its special tokens, and added ones
    that look like tags (<think>)."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return tuple(sorted({t.content for t in tokens if t.special or _is_tag(t.content)}, key=len, reverse=True))


@lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Returns the tokens that the tokenizer itself calls special."""
    tokens = tokenizer.added_tokens_decoder.values()
    return tuple(sorted({t.content for t in tokens if t.special and t.content.strip()}, key=len, reverse=True))


def _is_tag(text: str) -> bool:
    return re.fullmatch(r"[<\[]\S+[>\]]", text) is not None


@lru_cache(maxsize=8)
def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Returns the control tokens without paired tags such as <think>...</think>, which an
    assistant may write as text."""
    control = control_tokens(tokenizer)
    pairs = {token for token in control if token.startswith("</") and "<" + token[2:] in control}
    paired = pairs | {"<" + token[2:] for token in pairs}
    return tuple(token for token in control if token in special_tokens(tokenizer) or token not in paired)


def forget_tokens() -> None:
    """Forgets what is known of tokenizers, whose tokens may have changed since they were asked.

    Rendering calls it once per batch: some tokenizers have thousands of added tokens, and every turn asks for them.
    """
    for known in (control_tokens, special_tokens, turn_tokens):
        known.cache_clear()


@lru_cache(maxsize=32)
def any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the tokens, and nothing if there is none."""
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def shield(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[Conversation, Disguises]:
    """Returns the conversation with control tokens in its texts disguised, and what the disguises stand for.

    Paired tags in an assistant's own text are left alone: a ``<tool_call>`` written out there is how many data sets
    spell a call. All other tags are text. Raises `DataError` if a message holds both a control token and a private-use
    character of ours.
    """
    content = {key: conversation[key] for key in ("messages", "tools", "chat_template_kwargs") if conversation.get(key)}
    found = sorted({match for text in _texts(content) for match in any_of(control_tokens(tokenizer)).findall(text)})
    if not found:
        return conversation, {}
    disguises = {chr(_BASE + i): token for i, token in enumerate(found)}
    if any(character in text for text in _texts(content) for character in (*disguises, CUT)):
        raise DataError("a message mixes control tokens with private-use characters (U+F0000...); remove the latter")
    by_token = {token: character for character, token in disguises.items()}
    everything, own = any_of(tuple(found)), any_of(tuple(token for token in found if token in turn_tokens(tokenizer)))
    messages = [
        _replaced(message, own if message["role"] == "assistant" else everything, by_token)
        for message in conversation.get("messages") or []
    ]
    beside = {key: _replaced(value, everything, by_token) for key, value in content.items() if key != "messages"}
    return cast(Conversation, {**conversation, "messages": messages, **beside}), disguises


def _replaced(value: object, pattern: re.Pattern[str], by_token: dict[str, str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: by_token[match.group()], value)
    if isinstance(value, list):
        return [_replaced(item, pattern, by_token) for item in value]
    if isinstance(value, dict):
        return {_replaced(key, pattern, by_token): _replaced(item, pattern, by_token) for key, item in value.items()}
    return value


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in [str(key), *_texts(item)]]
    return []


def parts(text: str, disguises: Disguises) -> list[str]:
    """Returns ``text`` without disguises, in parts to encode one by one; a control token
    is cut after its first letter."""
    if not any(character in text for character in disguises):
        return [text]
    for character, token in disguises.items():
        text = text.replace(character, token[0] + CUT + token[1:])
    return [part for part in text.split(CUT) if part]
