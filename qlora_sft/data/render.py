"""Render a conversation to token ids and labels together, so that they cannot drift apart.

The template's text is cut where a supervised part begins and ends, and each piece is encoded on its own, as at
inference, where the prompt ends where the answer begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, TypedDict

from qlora_sft.data.code_parts import outputs_apart, placed
from qlora_sft.data.conversation import Conversation
from qlora_sft.data.coverage import Lost, lost_characters
from qlora_sft.data.pieces import Piece, RowPieces, Supervise, cut_row
from qlora_sft.data.reasoning import without_silenced
from qlora_sft.data.shield import forget_tokens, parts, shield
from qlora_sft.data.template import ChatFormat, apply, choose_chat_format
from qlora_sft.data.tool_turns import paired
from qlora_sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# This character is encoded as byte tokens, which merge with nothing.
_ANCHOR = "\uf8ff"
# Rows encoded in one call: enough to keep the tokenizer's threads busy, little enough to stay in memory.
_BATCH = 512


@dataclass(frozen=True)
class Rendered:
    """Holds one document.

    ``input_ids[i]`` is a label if and only if ``weights[i] > 0``; the first token never is, because nothing predicts
    it.
    """

    input_ids: list[int]
    weights: list[float]
    source: str
    lost: Lost = field(default_factory=dict, compare=False)
    """Characters that the vocabulary cannot represent and that are therefore not in
    ``input_ids``, and how many of each."""
    notes: dict[str, int] = field(default_factory=dict, compare=False)
    """Remarkable facts that are not faults, and how often each occurs."""

    @property
    def n_supervised(self) -> int:
        return len(self.weights) - self.weights.count(0.0)  # weights are never negative


class RenderOptions(TypedDict):
    """Holds the arguments of `render_conversation` besides the conversation and the tokenizer."""

    source: str
    chat_format: ChatFormat | None
    supervise: Supervise
    allow_special: bool


class Encoded(TypedDict):
    """Holds what a tokenizer returns for several texts."""

    input_ids: list[list[int]]
    offset_mapping: list[list[tuple[int, int]]]
    """Characters [first, last) of each token; there only if they were asked for."""


EncodedRow = tuple[list[int], list[float], DataError | None]
"""Holds token ids, their weights, and what is wrong with the row, if anything is."""


def render_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "",
    chat_format: ChatFormat | None = None,
    supervise: Supervise = "assistant",
    allow_special: bool = False,
) -> Rendered:
    """Returns token ids and label weights of one conversation, or of a plain text (``{"text": ...}``).

    Supervised is what the model has to produce: reasoning, text and tool calls of assistant turns, and the token that
    ends the turn. ``supervise`` says whether that applies to all turns, to the ``last`` one, or to ``all`` tokens of
    the conversation. A message with ``train: false`` is not supervised; one with ``weight: w`` counts w-fold. A plain
    text is supervised whole. One that is a rendered chat is refused unless ``supervise`` is ``all``.

    Raises `DataError` (without file and line, which the caller knows) if the template does not say which text belongs
    to which turn, or leaves out something that the conversation contains.
    """
    # Without the thread of `render_many`: a row that is rendered once per turn comes here for every turn.
    forget_tokens()
    chat_format = chat_format or _own_format(conversation, tokenizer)
    plan = cut_row(conversation, tokenizer, chat_format, supervise, allow_special)
    (result,) = _encoded([plan], tokenizer, _stops(chat_format), source)
    if isinstance(result, DataError):
        raise result
    return result


def render_many(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "",
    chat_format: ChatFormat | None = None,
    supervise: Supervise = "assistant",
    allow_special: bool = False,
) -> Iterator[Rendered | DataError]:
    """Yields what `render_conversation` returns for each of many rows, in order, or the error of a faulty row.

    Many rows are encoded in one call, which is several times faster, while the next ones are rendered.
    """
    rows = iter(conversations)
    with ThreadPoolExecutor(1) as worker:  # the tokenizer works without the interpreter's lock
        ahead: Future[list[Rendered | DataError]] | None = None
        while batch := list(islice(rows, _BATCH)):
            forget_tokens()
            planned: list[RowPieces | DataError] = []
            for row in batch:
                try:
                    chat_format = chat_format or _own_format(row, tokenizer)
                    planned.append(cut_row(row, tokenizer, chat_format, supervise, allow_special))
                except DataError as error:
                    # With its traceback it would hold this frame, and so the thread, until Python looks for circles:
                    # in any thread, also in one whose locks ending this one takes.
                    planned.append(error.with_traceback(None))
            encoding = worker.submit(_encoded, planned, tokenizer, _stops(chat_format), source)
            if ahead:
                yield from ahead.result()
            ahead = encoding
        if ahead:
            yield from ahead.result()


def _own_format(row: Conversation, tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    return None if "text" in row else choose_chat_format(tokenizer)


def _stops(chat_format: ChatFormat | None) -> frozenset[int]:
    return chat_format.stop_token_ids if chat_format else frozenset[int]()


def render_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> list[int]:
    """Returns the token ids of the conversation and the generation prompt behind it: what
    a model is given to answer."""
    forget_tokens()
    if not conversation.get("paired"):
        conversation = {**conversation, "messages": paired(conversation["messages"], set())}
    conversation = without_silenced(conversation)
    marked = placed(conversation)
    shielded, disguises = shield(marked, tokenizer)
    text, _ = apply(shielded, tokenizer, chat_format.template, prompt=True)
    stretches = [stretch for stretch, _ in outputs_apart(text)] if marked is not conversation else [text]
    cut = [part for stretch in stretches for part in parts(stretch, disguises)]
    pieces = [Piece(part, 0.0, apart=number > 0) for number, part in enumerate(cut)]
    (result,) = _encoded([RowPieces(pieces)], tokenizer, chat_format.stop_token_ids, "")
    if isinstance(result, DataError):
        raise result
    return result.input_ids


# ------------------------------------------------------------------ text -> ids


def _encoded(
    planned: list[RowPieces | DataError],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
    source: str,
) -> list[Rendered | DataError]:
    rows = [plan.pieces for plan in planned if isinstance(plan, RowPieces)]
    encode = _whole_rows if _writes_spaces(tokenizer) else _piecewise
    encoded = iter(encode(rows, tokenizer, stop_token_ids))
    results: list[Rendered | DataError] = []
    for plan in planned:
        if isinstance(plan, DataError):
            results.append(plan)
            continue
        ids, weights, fault = next(encoded)
        bos = tokenizer.bos_token_id
        # Some models begin every turn with their bos token; two at the very start are always a mistake.
        if bos is not None and ids[:2] == [bos, bos]:
            fault = DataError(
                f"the conversation begins with {tokenizer.bos_token!r} twice; remove one from the template"
            )
        lost = lost_characters([piece.text for piece in plan.pieces], tokenizer)
        results.append(fault or Rendered(ids, [0.0, *weights[1:]][: len(ids)], source, lost, plan.notes))
    return results


def _piecewise(
    rows: list[list[Piece]], tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]
) -> Iterator[EncodedRow]:
    """Encodes each piece by itself, as at inference, where the prompt ends where the answer begins."""
    # The text between the turns is the same in every row, so each text is encoded once.
    texts = list(dict.fromkeys(piece.text for pieces in rows for piece in pieces))
    encoded = dict(zip(texts, _batch(texts, tokenizer)["input_ids"], strict=True))
    for pieces in rows:
        ids: list[int] = []
        weights: list[float] = []
        fault = None
        for piece in pieces:
            new = encoded[piece.text]
            ids += new
            weights += [piece.weight] * len(new)
            fault = fault or _unended(piece, new[-1] if new else -1, tokenizer, stop_token_ids)
        yield ids, weights, fault


def _whole_rows(
    rows: list[list[Piece]], tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]
) -> Iterator[EncodedRow]:
    """Encodes the whole text at once; a token belongs to the piece that holds its last character.

    A control token belongs to the piece that holds its first character. This is for tokenizers that put a space before
    whatever they are given, or whose control tokens swallow white space: their pieces come out differently alone. Only
    where a message spells a control token is the text cut. What follows is encoded behind a private-use character, so
    that it is not taken for the beginning of a text.
    """
    groups = [_groups(pieces) for pieces in rows]
    texts = [
        (_ANCHOR if number else "") + "".join(piece.text for piece in group)
        for row in groups
        for number, group in enumerate(row)
    ]
    encoded = _batch(texts, tokenizer, offsets=True)
    each = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for row in groups:
        ids: list[int] = []
        weights: list[float] = []
        fault = None
        for number, group in enumerate(row):
            new, new_weights, new_fault = _assign(
                group, *next(each), len(_ANCHOR) if number else 0, tokenizer, stop_token_ids
            )
            ids, weights, fault = ids + new, weights + new_weights, fault or new_fault
        yield ids, weights, fault


def _groups(pieces: list[Piece]) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    for piece in pieces:
        if piece.apart or not groups:
            groups.append([])
        groups[-1].append(piece)
    return groups


def _assign(
    group: list[Piece],
    ids: list[int],
    offsets: list[tuple[int, int]],
    skip: int,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
) -> EncodedRow:
    """Returns ids and weights of one text; its first ``skip`` characters are the anchor."""
    kept: list[int] = []
    weights: list[float] = []
    fault = None
    number, end = 0, skip + len(group[0].text)
    control = tokenizer.added_tokens_decoder
    for token, (first, last) in zip(ids, offsets, strict=True):
        if last <= skip and skip:
            continue
        # A control token begins where it is written and may swallow what follows; a word may begin with a space
        # that still belongs to the header.
        while (first + 1 if token in control else last) > end:
            fault = fault or _unended(group[number], kept[-1] if kept else -1, tokenizer, stop_token_ids)
            number += 1
            end += len(group[number].text)
        kept.append(token)
        weights.append(group[number].weight)
    return kept, weights, fault or _unended(group[number], kept[-1] if kept else -1, tokenizer, stop_token_ids)


def _unended(
    piece: Piece, last: int, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]
) -> DataError | None:
    """Returns a fault if ``piece`` must end its turn and ``last`` is not a token at which generation stops."""
    if piece.ends_turn is None or last in stop_token_ids:
        return None
    return _endless(piece.ends_turn, last, tokenizer, stop_token_ids)


def _endless(message: int, last: int, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]) -> DataError:
    ending = tokenizer.decode([last]) if last >= 0 else ""
    return DataError(
        f"message {message}: the turn would end in {ending!r}, which does not stop generation "
        f"(the model stops at {tokenizer.convert_ids_to_tokens(sorted(stop_token_ids))}). Name the token in "
        "model.stop_tokens if it ends turns, else use another chat template"
    )


def _batch(texts: list[str], tokenizer: PreTrainedTokenizerBase, offsets: bool = False) -> Encoded:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    encoded: Encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,  # it would warn of long texts, which are split or dropped later
    )
    return encoded


def _writes_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Says whether a text's ids depend on its standing at the beginning, or control
    tokens swallow what is around them."""
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return True
    alone, behind = _batch(["x", tokenizer.eos_token + "x"], tokenizer)["input_ids"]
    return bool(behind[1:] != alone)
