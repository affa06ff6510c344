"""Drop, shorten, split or refuse a row that has more tokens than fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

from qlora_sft.config_data import Overlong
from qlora_sft.data.conversation import Conversation
from qlora_sft.data.formats import UNDESIRED
from qlora_sft.data.render import Rendered
from qlora_sft.errors import DataError

TOO_LONG = "too long"
NOTHING_LEFT = "nothing supervised within max_length"
NOTHING_SUPERVISED = "nothing supervised"
TOO_SHORT = "no answer of data.min_answer_tokens"


def fit(
    document: Rendered,
    conversation: Conversation,
    max_length: int,
    overlong: Overlong,
    render: Callable[[Conversation], Rendered],
) -> list[Rendered] | str:
    """Returns documents of at most ``max_length`` tokens, or the reason why there is none.

    An answer that its row marks as not wanted is dropped: trained on, it would be taught as if it were right.

    A row without a supervised token is dropped: a step made of such rows would learn nothing and report a loss of zero.

    A longer plain text is split into consecutive pieces. A longer conversation is dropped, or it loses its earliest
    turns until it fits (``truncate_left_turns``; the system message stays, and the rest begins with a user's turn), or
    it loses its last tokens (``truncate``). ``overlong: error`` raises `DataError`.

    render: renders a shortened conversation.
    """
    length = len(document.input_ids)
    if conversation.get("undesired"):
        return UNDESIRED
    if not any(document.weights[1:]):
        return NOTHING_SUPERVISED
    if length <= max_length:
        return [document]
    if overlong == "error":
        cure = f"raise data.max_length to {length} or set data.overlong=drop"
        raise DataError(f"{length} tokens, more than data.max_length={max_length}; {cure}")
    if "text" in conversation:
        return _pieces(document, max_length)
    if overlong == "truncate":
        cut = replace(document, input_ids=document.input_ids[:max_length], weights=document.weights[:max_length])
        return [cut] if any(cut.weights[1:]) else NOTHING_LEFT
    if overlong == "truncate_left_turns":
        return _without_first_turns(conversation, max_length, render)
    return TOO_LONG


def longest_answer(weights: list[float]) -> int:
    """Returns the tokens of the longest stretch that has weights, without its last token, which ends the turn."""
    stretches = (sum(1 for _ in group) for supervised, group in groupby(weights, bool) if supervised)
    return max(stretches, default=1) - 1


def _pieces(document: Rendered, max_length: int) -> list[Rendered]:
    """Splits a plain text into pieces of at most ``max_length`` tokens.

    Nothing predicts the first token of a piece, so it has no weight, and a last piece of one token is left out.
    """
    pieces = [
        replace(
            document,
            input_ids=document.input_ids[start : start + max_length],
            weights=[0.0, *document.weights[start + 1 : start + max_length]],
        )
        for start in range(0, len(document.input_ids), max_length)
    ]
    return pieces if len(pieces[-1].input_ids) > 1 else pieces[:-1]


def _without_first_turns(
    conversation: Conversation, max_length: int, render: Callable[[Conversation], Rendered]
) -> list[Rendered] | str:
    messages = conversation["messages"]
    system = [message for message in messages[:1] if message["role"] == "system"]
    starts = [i for i, message in enumerate(messages) if message["role"] == "user" and i > len(system)]
    for start in starts:
        rest = messages[start:]
        if not any(message["role"] == "assistant" for message in rest):
            break
        shorter = render({**conversation, "messages": [*system, *rest]})
        if len(shorter.input_ids) <= max_length:
            return [shorter] if any(shorter.weights[1:]) else NOTHING_LEFT
    return TOO_LONG
