"""Cut a conversation's rendered text into the pieces that are encoded one by one, each with its weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from qlora_sft.data.code_parts import MARKS, check_placed, outputs_apart, placed
from qlora_sft.data.complete import unwritten_keys
from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.data.opening import check_turn
from qlora_sft.data.prerendered import refuse_rendered_chat
from qlora_sft.data.reasoning import without_silenced
from qlora_sft.data.shield import Disguises, any_of, control_tokens, parts, shield
from qlora_sft.data.template import ChatFormat, Span, apply, gap_before, prompt_before, render_whole, variables
from qlora_sft.data.tool_turns import paired
from qlora_sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Supervise = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Piece:
    """Holds a part of the rendered text that is encoded by itself; its tokens all have the same weight."""

    text: str
    weight: float
    ends_turn: int | None = None
    """The message whose end of turn must be this piece's last token, if it is a supervised turn."""
    apart: bool = False
    """Whether the piece must not be encoded together with the one before it, because together they spell a control
    token, or because one of them is the output of code."""


@dataclass(frozen=True)
class RowPieces:
    """Holds what is encoded of a row, and how often each remarkable thing occurs in it."""

    pieces: list[Piece]
    notes: dict[str, int] = field(default_factory=dict)


def cut_row(
    row: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat | None,
    supervise: Supervise,
    allow_special: bool,
) -> RowPieces:
    """Returns the pieces of a conversation, or of a plain text. Raises `DataError`."""
    if chat_format is None or "text" in row:
        return _of_text(row["text"], tokenizer, supervise)
    notes: set[str] = set()
    if not row.get("paired"):
        row = {**row, "messages": paired(row["messages"], notes)}
    plan = _of_conversation(row, tokenizer, chat_format, supervise, allow_special)
    return RowPieces(plan.pieces, {**dict.fromkeys(sorted(notes), 1), **plan.notes})


def _of_text(text: str, tokenizer: PreTrainedTokenizerBase, supervise: Supervise) -> RowPieces:
    if supervise != "all":
        refuse_rendered_chat(text)
    begins = adds_bos(tokenizer) and not text.startswith(tokenizer.bos_token)
    begin = tokenizer.bos_token if begins else ""
    control = len(any_of(control_tokens(tokenizer)).findall(text))
    notes = {"control tokens in plain texts, which act as such": control} if control else {}
    return RowPieces([Piece(begin + text + tokenizer.eos_token, 1.0)], notes)


@lru_cache(maxsize=8)
def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Says whether the tokenizer puts bos before a plain text, as that of its model's training did.

    What it does counts: transformers 5 loads ``add_bos_token`` as false where a post-processor adds the token.
    """
    return tokenizer.bos_token_id is not None and bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _of_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    supervise: Supervise,
    allow_special: bool,
) -> RowPieces:
    """Returns the pieces of a conversation.

    Disguised control tokens are still in the text; `shield.parts` cuts them.
    """
    spoken = without_silenced(conversation)
    marked = placed(spoken)
    shielded, disguises = (marked, {}) if allow_special else shield(marked, tokenizer)
    shielded, text, spans = render_whole(shielded, tokenizer, chat_format)
    if marked is not spoken:
        check_placed(shielded, text, {span.message: (span.start, span.end) for span in spans})
    weights = {span.message: _weight(conversation["messages"][span.message]) for span in spans}
    if supervise == "last":
        weights = {message: weight if message == spans[-1].message else 0.0 for message, weight in weights.items()}
    if supervise == "all":
        _refuse_untrained_others(conversation)
    outside = 1.0 if supervise == "all" else 0.0
    pieces = []
    for start, end, span in _segments(text, spans):
        weight = outside if span is None else weights[span.message]
        written = list(outputs_apart(text[start:end])) if marked is not spoken else [(text[start:end], False)]
        # What runs the code writes its output, and a model that was trained on it would make it up.
        stretches = [(each, 0.0 if is_output and supervise != "all" else weight) for each, is_output in written]
        ends_turn = span.message if span is not None and weight > 0 else None
        if ends_turn is not None and not stretches[-1][1]:
            raise DataError(f"message {ends_turn}: the turn ends in an output, and nothing ends the turn")
        pieces += _pieces_of(stretches, disguises, ends_turn)
    silenced = [] if spoken is conversation else [each for each in conversation["messages"] if each.get("reasoning")]
    notes = _unread(shielded, text, tokenizer, chat_format, len(silenced))
    if marked is not spoken and MARKS["python"][0] not in control_tokens(tokenizer):
        notes["rows with code parts whose marks are text, because the vocabulary has no <|python_start|>"] = 1
    kept_as_text = sum(text.count(character) for character in disguises)
    if kept_as_text:
        notes["control tokens in messages kept as text (allow_special: true lets them act)"] = kept_as_text
    trained = [span for span in spans if weights[span.message] > 0]
    notes |= _of_turns(trained, text, shielded, tokenizer, chat_format)
    return RowPieces(pieces, notes)


def _pieces_of(stretches: list[tuple[str, float]], disguises: Disguises, ends_turn: int | None) -> list[Piece]:
    """Returns the pieces of neighbouring stretches of text, each with its weight. ends_turn: of the last of them.

    No token may reach over the bounds of an output: what runs the code encodes it by itself.
    """
    pieces = [
        Piece(part, weight, None, apart=place + number > 0)
        for place, (text, weight) in enumerate(stretches)
        for number, part in enumerate(parts(text, disguises))
    ]
    return [*pieces[:-1], replace(pieces[-1], ends_turn=ends_turn)]


def _unread(
    conversation: Conversation,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    silenced: int,
) -> dict[str, int]:
    """Returns notes on what the row says and the template does not use. silenced: turns that lost their reasoning."""
    notes = {}
    for key in conversation.get("chat_template_kwargs") or {}:
        if key not in variables(chat_format.template):
            notes[f"rows with {key!r} in chat_template_kwargs, which the chat template does not read"] = 1
    for key in sorted(unwritten_keys(conversation.get("tools") or [], text)):
        notes[f"rows with the key {key!r} in tools, which the chat template does not write"] = 1
    messages = conversation["messages"]
    if silenced:
        notes["turns without their reasoning, because enable_thinking is false"] = silenced
    forgotten = sum(1 for m in messages if m.get("past") and m.get("reasoning") and m["reasoning"].strip() not in text)
    if forgotten:
        notes["reasonings of earlier turns that the chat template leaves out, as it does at inference"] = forgotten
    # The name of a tool's result is used to find its call; other names may go unused.
    if any(message.get("name") and message["role"] != "tool" for message in messages):
        nameless = [message if message["role"] == "tool" else _without_name(message) for message in messages]
        if apply({**conversation, "messages": nameless}, tokenizer, chat_format.template)[0] == text:
            notes["rows with the key 'name' in messages, which the chat template does not write"] = 1
    return notes


def _of_turns(
    spans: list[Span],
    text: str,
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
) -> dict[str, int]:
    """Returns notes on turns that a runtime would begin or end elsewhere than the template writes them."""
    notes = Counter[str]()
    stops = any_of(tuple(tokenizer.convert_ids_to_tokens(sorted(chat_format.stop_token_ids))))
    template, ended = chat_format.template, any_of((tokenizer.eos_token,))
    for span in spans:
        before = prompt_before(conversation, span.message, tokenizer, template)
        check_turn(span.message, text, span.start, span.end, ended, before)
        if gap := gap_before(span, text, conversation, tokenizer, chat_format):
            notes[f"turns trained without {gap!r}, in which the generation prompt ends"] += 1
        inner = next((found for found in stops.finditer(text, span.start, span.end) if found.end() < span.end), None)
        if inner:
            notes[f"turns that continue after {inner.group()!r}, at which generation stops"] += 1
    return dict(notes)


def _without_name(message: Message) -> Message:
    changed: Message = {**message}
    changed.pop("name", None)
    return changed


def _refuse_untrained_others(conversation: Conversation) -> None:
    for number, message in enumerate(conversation["messages"]):
        if message["role"] != "assistant" and message.get("train") is False:
            raise DataError(
                f"message {number}: train: false on a {message['role']} message, but supervise: all trains every "
                "token; use supervise: assistant"
            )


def _segments(text: str, spans: list[Span]) -> Iterator[tuple[int, int, Span | None]]:
    """Yields the text from end to end, without empty parts: the spans, and what lies between them (None)."""
    position = 0
    for span in spans:
        if position < span.start:
            yield position, span.start, None
        yield span.start, span.end, span
        position = span.end
    if position < len(text):
        yield position, len(text), None


def _weight(message: Message) -> float:
    if message.get("train") is False:
        return 0.0
    return float(1.0 if message.get("weight") is None else message["weight"])
