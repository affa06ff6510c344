"""A conversation -> token ids and labels, together, so that they cannot drift apart.

The template's text is cut where a supervised part begins and ends, and each piece is encoded on its own, as it is
at inference, where the prompt ends where the answer begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from qlora_sft.data.shield import parts, shield
from qlora_sft.data.template import ChatFormat, Span, chat_format, check_nothing_lost, render_text
from qlora_sft.errors import DataError

Supervise = Literal["assistant", "last", "all"]

# Rows encoded in one call: enough to keep the tokenizer's threads busy, little enough to stay in memory.
_BATCH = 512


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
class Piece:
    """A part of the rendered text that is encoded by itself; its tokens all have the same weight."""

    text: str
    weight: float
    ends_turn: int | None = None
    """The message whose end of turn must be this piece's last token, if it is a supervised turn."""


def render_conversation(
    conversation: dict[str, Any],
    tokenizer: Any,
    *,
    source: str = "",
    style: ChatFormat | None = None,
    supervise: Supervise = "assistant",
) -> Rendered:
    """Token ids and label weights of one conversation, or of a plain text (``{"text": ...}``).

    Supervised is what the model has to produce: reasoning, text and tool calls of assistant turns, and the token
    that ends the turn (``supervise``: of all of them, of the ``last`` one, or ``all`` tokens of the conversation).
    A message with ``train: false`` is not, one with ``weight: w`` counts w-fold. A plain text is supervised whole.

    Raises `DataError` (without file and line, the caller knows them) if the template does not say which text
    belongs to which turn, or leaves out something the conversation contains.
    """
    (result,) = render_many([conversation], tokenizer, source=source, style=style, supervise=supervise)
    if isinstance(result, DataError):
        raise result
    return result


def render_many(
    conversations: Iterable[dict[str, Any]],
    tokenizer: Any,
    *,
    source: str = "",
    style: ChatFormat | None = None,
    supervise: Supervise = "assistant",
) -> Iterator[Rendered | DataError]:
    """`render_conversation` for many, in order, an error in place of each row that has one.

    The pieces of many rows are encoded in one call, which is several times faster.
    """
    rows = iter(conversations)
    while batch := list(islice(rows, _BATCH)):
        planned: list[list[Piece] | DataError] = []
        for row in batch:
            try:
                if "text" in row:
                    planned.append(_text_pieces(row["text"], tokenizer))
                    continue
                style = style or chat_format(tokenizer)
                planned.append(_pieces(row, tokenizer, style.template, supervise))
            except DataError as error:
                planned.append(error)
        yield from _encoded(planned, tokenizer, style.stops if style else frozenset(), source)


def _text_pieces(text: str, tokenizer: Any) -> list[Piece]:
    begin = tokenizer.bos_token if getattr(tokenizer, "add_bos_token", False) else ""
    return [Piece(begin + text + tokenizer.eos_token, 1.0)]


def _pieces(conversation: dict[str, Any], tokenizer: Any, template: str, supervise: Supervise) -> list[Piece]:
    """The rendered text in pieces; disguised control tokens are still in it, cut in their turn by `shield.parts`."""
    shielded, disguises = shield(conversation, tokenizer)
    text, spans = render_text(shielded, tokenizer, template)
    check_nothing_lost(shielded, text, spans)
    weights = {span.message: _weight(conversation["messages"][span.message]) for span in spans}
    if supervise == "last":
        weights = {message: weight if message == spans[-1].message else 0.0 for message, weight in weights.items()}
    outside = 1.0 if supervise == "all" else 0.0
    pieces = []
    for start, end, span in _segments(text, spans):
        weight = outside if span is None else weights[span.message]
        cut = parts(text[start:end], disguises)
        pieces += [Piece(part, weight) for part in cut]
        if span is not None and weight and cut:
            pieces[-1] = Piece(cut[-1], weight, span.message)
    return pieces


def _segments(text: str, spans: list[Span]) -> Iterator[tuple[int, int, Span | None]]:
    """The text from end to end: what lies between the spans (None) and the spans, without empty parts."""
    position = 0
    for span in spans:
        if position < span.start:
            yield position, span.start, None
        yield span.start, span.end, span
        position = span.end
    if position < len(text):
        yield position, len(text), None


def _weight(message: dict[str, Any]) -> float:
    if message.get("train") is False:
        return 0.0
    return float(1.0 if message.get("weight") is None else message["weight"])


# ------------------------------------------------------------------ text -> ids


def _encoded(
    planned: list[list[Piece] | DataError], tokenizer: Any, stops: frozenset[int], source: str
) -> Iterator[Rendered | DataError]:
    first = [piece.text for pieces in planned if isinstance(pieces, list) for piece in pieces[:1]]
    later = [piece.text for pieces in planned if isinstance(pieces, list) for piece in pieces[1:]]
    first_ids, later_ids = iter(_ids(first, tokenizer, "")), iter(_ids(later, tokenizer, _anchor(tokenizer)))
    for pieces in planned:
        if isinstance(pieces, DataError):
            yield pieces
            continue
        ids: list[int] = []
        weights: list[float] = []
        fault = None
        for number, piece in enumerate(pieces):
            new = next(later_ids if number else first_ids)
            ids += new
            weights += [piece.weight] * len(new)
            if piece.ends_turn is not None and new[-1] not in stops:
                fault = _endless(piece.ends_turn, new[-1], tokenizer, stops)
        bos = tokenizer.bos_token_id
        # Some models begin every turn with their bos token; two at the very start are always a mistake.
        if bos is not None and ids[:2] == [bos, bos]:
            fault = DataError(
                f"the conversation begins with {tokenizer.bos_token!r} twice; remove one from the template"
            )
        yield fault or Rendered(ids, weights, source)


def _endless(message: int, last: int, tokenizer: Any, stops: frozenset[int]) -> DataError:
    return DataError(
        f"message {message}: the turn would end in {tokenizer.decode([last])!r}, which does not stop generation "
        f"(the model stops at {tokenizer.convert_ids_to_tokens(sorted(stops))}). Name the token in model.stop_tokens "
        "if it ends turns, else use another chat template"
    )


def _ids(texts: list[str], tokenizer: Any, anchor: str) -> list[list[int]]:
    """Ids of each text, encoded behind ``anchor``, whose own ids are left out."""
    if not texts:
        return []
    encoded = tokenizer([anchor + text for text in texts], add_special_tokens=False, return_attention_mask=False)
    skip = len(tokenizer(anchor, add_special_tokens=False)["input_ids"]) if anchor else 0
    return [ids[skip:] for ids in encoded["input_ids"]]


@lru_cache(maxsize=8)
def _anchor(tokenizer: Any) -> str:
    """What a piece is encoded behind, if it is not the first.

    SentencePiece-like tokenizers put a space before the first word of whatever they are given; behind an anchor a
    piece is not the beginning. The anchor is a private-use character: it consists of byte tokens, which merge with
    nothing. Other tokenizers need none.
    """
    if (
        tokenizer("x", add_special_tokens=False)["input_ids"]
        == tokenizer("\uf8ffx", add_special_tokens=False)["input_ids"][
            len(tokenizer("\uf8ff", add_special_tokens=False)["input_ids"]) :
        ]
    ):
        return ""
    return "\uf8ff"
