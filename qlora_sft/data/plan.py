"""Make labelled documents and packed sequences of conversations, or take them from the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_sft.config import Config
from qlora_sft.data import store
from qlora_sft.data.ledger import ledger_table
from qlora_sft.data.overlap import seen_before, shared_documents
from qlora_sft.data.prepare import Prepared, render_sources
from qlora_sft.data.sequences import CAN_SHARE, Packed, Sharing, plan_sequences
from qlora_sft.data.sources import Source
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError
from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plan_data(
    config: Config,
    train_sources: list[Source],
    held_out_sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    say: Say,
    sharing: Sharing = CAN_SHARE,
) -> tuple[Prepared, Prepared, Packed]:
    """Returns the training split, the held-out split, and the packed sequences of training documents in order.

    It prints what became of every row. The result is kept in the user's cache, so a second start with the same files,
    settings, template and tokenizer takes no time. Data sets of the Hub are prepared anew each time. Raises one
    `DataError` for the faults of both splits.
    """
    key = store.fingerprint(config, [*train_sources, *held_out_sources], tokenizer, chat_format, sharing)
    kept = store.load(key) if key else None
    if kept:
        train, held_out, packed, said = kept
        say("data: unchanged since it was last prepared, taken from the cache")
        for text in said:
            say(text)
        return train, held_out, packed
    said = []

    def say_and_keep(text: str) -> None:
        said.append(text)
        say(text)

    splits, problems = [], []
    for sources in (train_sources, held_out_sources):
        try:
            splits.append(render_sources(sources, config.data, tokenizer, chat_format))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    train, held_out = splits
    say_and_keep("training data\n" + ledger_table(train.ledger))
    if held_out.ledger:
        say_and_keep("held-out data\n" + ledger_table(held_out.ledger))
    if shared := shared_documents(train.documents, held_out.documents):
        say_and_keep(shared)
    if config.data.deduplicate == "none":
        for name, others in seen_before(train.documents).items():
            train.ledger[name].also_in = others
    packed = plan_sequences(
        train.all_documents, config.data, config.training.epochs, config.seed, say_and_keep, sharing
    )
    if key:
        store.save(key, train, held_out, packed, said)
    return train, held_out, packed
