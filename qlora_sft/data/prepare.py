"""Render sources to documents and pack them, with a ledger of what became of every row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from random import Random
from typing import TYPE_CHECKING

from qlora_sft.config_data import DataConfig
from qlora_sft.data.conversation import Conversation
from qlora_sft.data.documents import Chain, Documents, Sizes, Writer, sizes
from qlora_sft.data.fit import NOTHING_SUPERVISED, fit
from qlora_sft.data.formats import with_thinking
from qlora_sft.data.ledger import SourceLedger
from qlora_sft.data.mixture import Pick, mixture_table, plan_order
from qlora_sft.data.packing import pack
from qlora_sft.data.render import Rendered, RenderOptions, render_conversation, render_many
from qlora_sft.data.sources import MAX_PROBLEMS, Source, place
from qlora_sft.data.template import ChatFormat
from qlora_sft.data.unroll import UNROLLED, unrolled
from qlora_sft.errors import DataError
from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Prepared:
    """Holds the documents of one split, by source, and the ledger that accounts for every row."""

    documents: dict[str, Documents]
    ledger: dict[str, SourceLedger]

    @property
    def all_documents(self) -> Chain:
        return Chain(list(self.documents.values()))


def render_sources(
    sources: list[Source], config: DataConfig, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat | None = None
) -> Prepared:
    """Renders every conversation and accounts for it.

    Raises one `DataError` naming file and line of every row that cannot be rendered (the first ten of a source). It is
    also raised if a source ends up with 0% or 100% supervised tokens: both mean a wrong mask, and both train without
    complaint. Plain text is supervised whole, and may be.
    """
    prepared = Prepared({}, {})
    problems: list[str] = []
    for source in sources:
        gone = sum(map(len, source.removed.values()))
        ledger = SourceLedger(str(source.path), [str(file) for file in source.files], source.read)
        ledger.not_drawn = source.read - len(source.rows) - gone
        for reason, places in source.removed.items():
            ledger.drop(reason, places)
        try:
            documents, whole = _render_source(source, config, tokenizer, chat_format, ledger)
            _count(ledger, documents)
            _check_mask(source, ledger, config, whole)
        except DataError as error:
            problems.append(str(error))
            continue
        prepared.documents[source.name] = documents
        prepared.ledger[source.name] = ledger
    if problems:
        raise DataError("\n".join(problems))
    return prepared


def _render_source(
    source: Source,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat | None,
    ledger: SourceLedger,
) -> tuple[Documents, bool]:
    """Returns the documents that fit, and whether all of them may be supervised whole;
    the rest goes into the ledger."""
    settings = source.settings
    documents, whole, problems = Writer(source.name), True, []
    for conversation, rendered, fitting in _fitted(source, config, tokenizer, chat_format):
        whole = whole and ("text" in conversation or settings.supervise == "all")
        if isinstance(fitting, DataError):
            problems.append(f"{place(conversation)}: {fitting}")
            if len(problems) == MAX_PROBLEMS:
                problems.append(f"{source.path}: stopped after {MAX_PROBLEMS} faults")
                break
            continue
        kept = [document for part in fitting if not isinstance(part, str) for document in part]
        if not kept:
            ledger.drop(next(reason for reason in fitting if isinstance(reason, str)), [place(conversation)])
            continue
        ledger.kept += 1
        ledger.shortened += kept != rendered
        _remark(ledger, conversation, rendered)
        for document in kept:
            documents.add(_weighted(document, settings.loss_weight))
    if problems:
        raise DataError("\n".join(problems))
    return documents.finish(), whole


def render_rows(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat | None
) -> Iterator[Rendered]:
    """Yields the documents of ``source`` that fit, rendered as they are taken. Raises
    `DataError` at the first faulty row."""
    for conversation, _, fitting in _fitted(source, config, tokenizer, chat_format):
        if isinstance(fitting, DataError):
            raise DataError(f"{place(conversation)}: {fitting}")
        for part in fitting:
            if not isinstance(part, str):
                yield from part


Fitting = list[list[Rendered] | str]
"""Holds, for each document that a row was rendered to, the documents of it that fit, or why it is dropped."""


def _fitted(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat | None
) -> Iterator[tuple[Conversation, list[Rendered], Fitting | DataError]]:
    """Yields every row, the documents that it is rendered to, and what of them fits, or what is wrong with the row."""
    settings = source.settings
    options: RenderOptions = {
        "source": source.name,
        "chat_format": chat_format,
        "supervise": settings.supervise,
        "allow_special": settings.allow_special,
    }
    render = partial(_render_one, tokenizer, options)
    # Rows are read once: the renderer takes the second half of the tee, some hundreds ahead of the first.
    rows, ahead = tee(with_thinking(conversation, settings.thinking) for conversation in source.rows)
    for conversation, result in zip(rows, render_many(ahead, tokenizer, **options), strict=True):
        documents: list[Rendered] = []
        try:
            rendered = (
                [(conversation, result)]
                if isinstance(result, Rendered)
                else _per_turn(conversation, result, render, settings.supervise)
            )
            documents = [document for _, document in rendered]
            fitting: Fitting | DataError = [
                fit(document, part, config.max_length, config.overlong, render) for part, document in rendered
            ]
        except DataError as error:
            fitting = error
        yield conversation, documents, fitting


def _per_turn(
    conversation: Conversation, fault: DataError, render: Callable[[Conversation], Rendered], supervise: str
) -> list[tuple[Conversation, Rendered]]:
    """Renders a row that cannot be one document as one per turn. Raises ``fault`` if that fails, too."""
    parts = unrolled(conversation, supervise)
    try:
        rendered = [(part, render(part)) for part in parts]
    except DataError:
        rendered = []
    if not rendered:
        raise fault
    return rendered


def _remark(ledger: SourceLedger, conversation: Conversation, documents: list[Rendered]) -> None:
    """Notes what is remarkable about a kept row and what it loses, once, however many documents it has."""
    notes = Counter[str]()
    lost = Counter[str]()
    for document in documents:
        notes.update(document.notes)
        lost |= Counter(document.lost)
    notes |= Counter(dict.fromkeys(conversation.get("notes", ()), 1))
    if len(documents) > 1:
        notes[UNROLLED] = 1
    ledger.lose(dict(lost), place(conversation))
    ledger.note(dict(notes), place(conversation))


def _render_one(tokenizer: PreTrainedTokenizerBase, options: RenderOptions, conversation: Conversation) -> Rendered:
    return render_conversation(conversation, tokenizer, **options)


def _weighted(document: Rendered, factor: float) -> Rendered:
    return document if factor == 1 else replace(document, weights=[weight * factor for weight in document.weights])


def _count(ledger: SourceLedger, documents: Documents) -> None:
    of_each = sizes(documents)
    lengths = sorted(of_each.tokens)
    ledger.tokens = sum(lengths)
    ledger.supervised = sum(of_each.supervised)
    if lengths:
        # Nearest rank: the shortest length that this share of the rows does not exceed.
        ledger.p50, ledger.p95, ledger.p99 = (lengths[math.ceil(p * len(lengths)) - 1] for p in (0.5, 0.95, 0.99))
        ledger.longest = lengths[-1]


def _check_mask(source: Source, ledger: SourceLedger, config: DataConfig, whole: bool) -> None:
    path, name = source.path, source.name
    unlabelled = ledger.dropped[NOTHING_SUPERVISED].rows if NOTHING_SUPERVISED in ledger.dropped else 0
    if not ledger.kept and unlabelled == len(source.rows):
        raise DataError(
            f"{path}: no token of {name!r} is supervised; are all assistant turns marked train: false, or weight: 0?"
        )
    if not ledger.kept:
        cure = f"raise data.max_length (now {config.max_length}) or shorten them"
        rest = f", but for {unlabelled} in which nothing is supervised" if unlabelled else ""
        raise DataError(f"{path}: all {len(source.rows)} conversations of {name!r} are too long{rest}; {cure}")
    if ledger.supervised == ledger.tokens and not whole:
        raise DataError(
            f"{path}: every token of {name!r} is supervised, the prompts too; use another model.chat_template"
        )


def plan_sequences(
    documents: Sequence[Rendered], config: DataConfig, epochs: int, seed: int, say: Say = lambda _: None
) -> list[list[int]]:
    """Returns the packed sequences of the whole run in training order, as indices of documents.

    The mixture says which documents come and when (`plan_order`); a document that it repeats is in several sequences.
    Each stretch of its order is packed alone: an epoch, a part of a curriculum, or ``packing_window`` documents of
    those. Its sequences are shuffled, so that sequences hold what the mixture has at that time. The same seed gives the
    same order on every machine.
    """
    of_each = sizes(documents)
    numbers: dict[str, list[int]] = {}
    for index, source in enumerate(of_each.source):
        numbers.setdefault(source, []).append(index)
    order = plan_order({name: len(indices) for name, indices in numbers.items()}, config, epochs, seed)
    say(describe_order(order, of_each, numbers, config, epochs))
    planned: list[list[int]] = []
    for number, picks in enumerate(order):
        indices = [numbers[name][row] for name, row in picks]
        shuffled = Random(f"bins {seed} {number}")
        for window in _windows(indices, config.packing_window):
            packed = pack([of_each.tokens[index] for index in window], config.max_length, strategy=config.packing)
            sequences = [[window[i] for i in each] for each in packed]
            shuffled.shuffle(sequences)
            planned += sequences
    if config.packing != "none":
        say(describe_packing(planned, of_each.tokens, config))
    return planned


def _windows(indices: list[int], size: int | None) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)] if size else [indices]


def describe_order(
    order: list[list[Pick]], of_each: Sizes, numbers: dict[str, list[int]], config: DataConfig, epochs: int
) -> str:
    """Returns the mixture as text: the strategy, and a table of what the run will really train on."""
    facts = {
        name: [(of_each.tokens[i], of_each.supervised[i], of_each.weight[i]) for i in indices]
        for name, indices in numbers.items()
    }
    strategy = config.mixture + (f", T = {config.temperature:g}" if config.temperature else "")
    if config.replay:
        fall = f", falling from {2 * config.replay.share:.1%} to 0" if config.curriculum == "progressive" else ""
        strategy += f"; replay {config.replay.share:.1%} of the rows{fall}"
    return f"mixture ({strategy}; {epochs} epochs)\n" + mixture_table(order, facts)


def describe_packing(sequences: list[list[int]], tokens: list[int], config: DataConfig) -> str:
    lengths = [tokens[index] for each in sequences for index in each]
    filled = sum(lengths) / (len(sequences) * config.max_length)
    padded = sum(lengths) / (len(lengths) * max(lengths))
    return (
        f"packing ({config.packing}): {len(lengths):,} documents in {len(sequences):,} packed sequences "
        f"of {config.max_length:,} tokens, {filled:.1%} filled (one padded sequence per document: {padded:.1%})"
    )
