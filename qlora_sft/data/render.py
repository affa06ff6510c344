"""A conversation -> token ids and labels, together, from the structure of the chat template.

The text is never searched for marker strings. The template says which characters a turn produced (its
``{% generation %}`` marks, or else the difference between the prompt for a turn and the rendering with it), the
text is cut exactly there, and each piece is encoded on its own, as it is at inference, where the prompt ends
where the answer begins. Control tokens that occur *inside* a message are encoded as ordinary text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from qlora_sft.data.read import Conversation
from qlora_sft.errors import DataError

# Stand-ins for control tokens inside messages while the template runs: private-use characters, one per token.
_SHIELD_BASE = 0xF0000

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """``input_ids[i]`` is a training target iff ``weights[i] > 0``; the first token never is (nothing predicts it)."""

    input_ids: list[int]
    weights: list[float]
    source: str

    @property
    def n_supervised(self) -> int:
        return sum(weight > 0 for weight in self.weights)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the rendered text, written by the model in the given message."""

    start: int
    end: int
    message: int


def render_conversation(conversation: Conversation, tokenizer: Any, *, source: str = "") -> Rendered:
    """Token ids and label weights of one conversation under the tokenizer's chat template.

    Supervised is what the model has to produce: reasoning, text and tool calls of every assistant turn, and the
    token that ends the turn. A message with ``train: false`` is not, one with ``weight: w`` counts w-fold.

    Raises `DataError` (without file and line, the caller knows them) if the template does not say which text
    belongs to which turn, or leaves out something the conversation contains.
    """
    special = _special_tokens(tokenizer)
    shielded, hidden = _shield(conversation, special)
    text, spans = render_text(shielded, tokenizer)
    _check_nothing_lost(shielded, text, spans)
    ids: list[int] = []
    weights: list[float] = []
    position = 0
    for span in spans:
        before = _encode(text[position : span.start], tokenizer, special, hidden, first=not ids)
        inside = _encode(text[span.start : span.end], tokenizer, special, hidden, first=False)
        weight = _weight(conversation["messages"][span.message])
        ids += before + inside
        weights += [0.0] * len(before) + [weight] * len(inside)
        if weight and inside[-1] not in end_of_turn_ids(tokenizer):
            last = tokenizer.decode(inside[-1:])
            raise DataError(
                f"message {span.message}: the turn would end in {last!r}, which does not stop generation "
                f"(stop tokens: {tokenizer.convert_ids_to_tokens(sorted(end_of_turn_ids(tokenizer)))}); "
                "use a chat template that ends turns with the tokenizer's eos token: model.chat_template=chatml-think"
            )
        position = span.end
    tail = _encode(text[position:], tokenizer, special, hidden, first=not ids)
    return Rendered(ids + tail, weights + [0.0] * len(tail), source)


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Tokens at which generation stops."""
    return {tokenizer.eos_token_id}


def render_text(conversation: Conversation, tokenizer: Any) -> tuple[str, list[Span]]:
    """The template's text and the span of every assistant message, in order.

    Raises `DataError` if they cannot be derived without guessing.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise DataError("the tokenizer has no chat template; set model.chat_template (shipped: chatml-think)")
    turns = [i for i, m in enumerate(conversation["messages"]) if m["role"] == "assistant"]
    if _GENERATION_MARK.search(template):
        text, bounds = _apply(conversation, template, tokenizer, marks=True)
        if len(bounds) != len(turns):
            raise DataError(f"the template marks {len(bounds)} generated parts for {len(turns)} assistant turns")
        return text, [Span(start, end, turn) for (start, end), turn in zip(bounds, turns, strict=True)]
    text, _ = _apply(conversation, template, tokenizer)
    return text, [_span_by_prefix(conversation, turn, text, template, tokenizer) for turn in turns]


def _span_by_prefix(conversation: Conversation, turn: int, text: str, template: str, tokenizer: Any) -> Span:
    """The turn is what follows its generation prompt; both renderings must be prefixes of the whole text.

    A template that rewrites history (drops earlier reasoning, trims) breaks that, and is refused.
    """
    messages = conversation["messages"]
    prompt, _ = _apply({**conversation, "messages": messages[:turn]}, template, tokenizer, add_generation_prompt=True)
    until, _ = _apply({**conversation, "messages": messages[: turn + 1]}, template, tokenizer)
    if not (text.startswith(prompt) and text.startswith(until) and until.startswith(prompt)):
        raise DataError(
            f"message {turn}: the chat template writes this turn differently when more turns follow or when it is "
            "prompted for, so its text cannot be told apart with certainty. Use a template with {% generation %} "
            "marks: model.chat_template=chatml-think or your own .jinja file"
        )
    # What follows the last control token (a newline, mostly) belongs to the template, not to the model.
    ends = [match.end() for match in _pattern(_special_tokens(tokenizer)).finditer(until, len(prompt))]
    return Span(len(prompt), ends[-1] if ends else len(until), turn)


def _apply(
    conversation: Conversation,
    template: str,
    tokenizer: Any,
    *,
    marks: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    import jinja2

    try:
        texts, bounds = render_jinja_template(
            [conversation["messages"]],
            tools=conversation.get("tools") or None,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
            **(conversation.get("chat_template_kwargs") or {}),
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None
    return texts[0], bounds[0] if marks else []


def _weight(message: dict[str, Any]) -> float:
    if message.get("train") is False:
        return 0.0
    return float(1.0 if message.get("weight") is None else message["weight"])


# ------------------------------------------------------------------ control tokens inside messages


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)


def _pattern(tokens: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _shield(conversation: Conversation, special: list[str]) -> tuple[Conversation, dict[str, str]]:
    """The conversation with every control token in its texts replaced by a private character, and what they hide.

    Without this, ``<|im_start|>assistant`` typed by a user would become a turn of the assistant.
    """
    content = {key: conversation[key] for key in ("messages", "tools") if conversation.get(key)}
    flat = "".join(_texts(content))
    found = [token for token in special if token in flat]
    if not found:
        return conversation, {}
    hidden = {chr(_SHIELD_BASE + i): token for i, token in enumerate(found)}
    if any(character in flat for character in hidden):
        raise DataError("a message mixes control tokens with private-use characters (U+F0000...); remove the latter")
    by_token = {token: character for character, token in hidden.items()}
    pattern = _pattern(found)

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: by_token[match.group()], value)
        if isinstance(value, list):
            return [replace(item) for item in value]
        if isinstance(value, dict):
            return {replace(key): replace(item) for key, item in value.items()}
        return value

    return {**conversation, **replace(content)}, hidden


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in [str(key), *_texts(item)]]
    return []


def _encode(text: str, tokenizer: Any, special: list[str], hidden: dict[str, str], *, first: bool) -> list[int]:
    """Ids of one piece. Structure (control tokens from the template) and content are told apart if need be."""
    if not text:
        return []
    if not any(character in text for character in hidden):
        return _plain_ids(text, tokenizer, first)
    if _adds_space(tokenizer):
        names = ", ".join(sorted(set(hidden.values())))
        raise DataError(
            f"a message contains control tokens ({names}), which this kind of tokenizer cannot encode as text"
        )
    ids: list[int] = []
    for part in re.split(f"({_pattern(special).pattern})", text):
        if part in special:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            for character, token in hidden.items():
                part = part.replace(character, token)
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _plain_ids(text: str, tokenizer: Any, first: bool) -> list[int]:
    if first or not _adds_space(tokenizer):
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    # Encoded behind a control token, the piece is not the beginning of the text, so no space is put before it.
    return list(tokenizer(tokenizer.eos_token + text, add_special_tokens=False)["input_ids"][1:])


@lru_cache(maxsize=8)
def _adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer (SentencePiece kind) puts a space before the first word of whatever it is given."""
    alone = tokenizer("x", add_special_tokens=False)["input_ids"]
    behind = tokenizer(tokenizer.eos_token + "x", add_special_tokens=False)["input_ids"][1:]
    return bool(alone != behind)


# ------------------------------------------------------------------ nothing is lost


def _check_nothing_lost(conversation: Conversation, text: str, spans: list[Span]) -> None:
    """Every message's text is in the rendering, and every assistant turn's in its own span.

    A template that knows no tools or no reasoning leaves them out without a word; the model would then learn
    to answer without them.
    """
    of_message = {span.message: text[span.start : span.end] for span in spans}
    silent = (conversation.get("chat_template_kwargs") or {}).get("enable_thinking") is False
    for index, message in enumerate(conversation["messages"]):
        where = of_message.get(index, text)
        wanted = {"content": message.get("content") or ""}
        if message.get("reasoning") and not silent:
            wanted["reasoning"] = message["reasoning"]
        for call in message.get("tool_calls") or []:
            wanted["tool_calls"] = call.get("function", call)["name"]
        for key, value in wanted.items():
            if value.strip() not in where:
                raise DataError(
                    f"message {index} ({message['role']}): the chat template leaves out its {key!r}; use one that "
                    "knows it, e.g. model.chat_template=chatml-think"
                )
    for tool in conversation.get("tools") or []:
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise DataError(f"the chat template leaves out the tool {name!r}; use model.chat_template=chatml-think")
