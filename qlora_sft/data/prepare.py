"""Render sources to documents and pack them, with a ledger of what became of every row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, repeat, tee
from typing import TYPE_CHECKING

from qlora_sft.config_data import DataConfig, Overlong, ReplayConfig, TrainSourceConfig
from qlora_sft.data.conversation import Conversation
from qlora_sft.data.documents import Chain, Documents, Writer, answer_counts, sizes
from qlora_sft.data.fit import NOTHING_SUPERVISED, TOO_SHORT, fit, longest_answer
from qlora_sft.data.formats import UNDESIRED, with_thinking
from qlora_sft.data.ledger import FEW, SourceLedger
from qlora_sft.data.render import Rendered, RenderOptions, render_conversation, render_many
from qlora_sft.data.row_faults import RowFaults
from qlora_sft.data.sources import Source, place
from qlora_sft.data.template import ChatFormat, as_prompted
from qlora_sft.data.unroll import PER_TURN, UNROLLED, unrolled
from qlora_sft.errors import DataError

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
    also raised if a source ends up with 0% or 100% supervised tokens: both mean a wrong mask, and training would not
    complain about either. Plain text may be supervised as a whole.
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
            documents = _render_source(source, config, tokenizer, chat_format, ledger)
            _count(ledger, documents)
            _check_mask(source, ledger, config, len(documents))
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
) -> Documents:
    """Returns the documents that fit. ``ledger`` gets an account of all other rows, and whether everything may be
    supervised."""
    settings = source.settings
    documents, faults = Writer(source.name), RowFaults()
    ledger.whole = True
    for conversation, rendered, fitting in fitted_rows(source, config, tokenizer, chat_format):
        ledger.whole = ledger.whole and ("text" in conversation or settings.supervise == "all")
        if isinstance(fitting, DataError):
            faults.add(place(conversation), str(fitting))
            if faults.enough:
                break
            continue
        kept = [document for part in fitting if not isinstance(part, str) for document in part]
        if not kept:
            ledger.drop(next(reason for reason in fitting if isinstance(reason, str)), [place(conversation)])
            continue
        ledger.kept += 1
        ledger.shortened += kept != rendered
        _remark(ledger, conversation, rendered, PER_TURN if settings.supervise == "turns" else UNROLLED)
        _account(ledger, conversation, rendered, fitting, config.overlong)
        for document in kept:
            documents.add(_weighted(document, settings.loss_weight))
    if faults:
        raise DataError("\n".join(faults.lines(str(source.path))))
    return documents.finish()


def render_rows(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat | None
) -> Iterator[Rendered]:
    """Yields the documents of ``source`` that fit, rendered as they are taken. Raises
    `DataError` at the first faulty row."""
    for conversation, _, fitting in fitted_rows(source, config, tokenizer, chat_format):
        if isinstance(fitting, DataError):
            raise DataError(f"{place(conversation)}: {fitting}")
        for part in fitting:
            if not isinstance(part, str):
                yield from part


Fitting = list[list[Rendered] | str]
"""Holds, for each document that a row was rendered to, the documents of it that fit, or why it is dropped."""


def fitted_rows(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat | None
) -> Iterator[tuple[Conversation, list[Rendered], Fitting | DataError]]:
    """Yields every row with the documents that it is rendered to, and either the parts of them that fit or what is
    wrong with the row."""
    settings = source.settings
    options: RenderOptions = {
        "source": source.name,
        "chat_format": chat_format,
        "supervise": "assistant" if settings.supervise == "turns" else settings.supervise,
        "allow_special": settings.allow_special,
    }
    turns = settings.supervise == "turns"
    render = partial(_render_as_prompted if turns else _render_one, tokenizer, options)
    # Held-out rows teach nothing, so they are all measured.
    least = config.min_answer_tokens if isinstance(settings, TrainSourceConfig | ReplayConfig) else None
    rows: Iterable[Conversation] = (with_thinking(row, settings.thinking) for row in source.rows)
    whole: Iterator[Rendered | DataError | None] = repeat(None)
    if not turns:
        # Rows are read once: the renderer takes the second half of the tee, some hundreds ahead of the first.
        rows, ahead = tee(rows)
        whole = render_many(ahead, tokenizer, **options)
    try:
        # The renderer first, so that it comes to its end, and its thread with it.
        for result, conversation in zip(whole, rows, strict=False):
            documents: list[Rendered] = []
            try:
                parts = _parts(conversation, result, render, options["supervise"])
                documents = [document for _, document in parts]
                fitted: Fitting = [
                    fit(document, part, config.max_length, config.overlong, render) for part, document in parts
                ]
                fitting: Fitting | DataError = _without_short(fitted, least) if "text" not in conversation else fitted
            except DataError as error:
                fitting = error.with_traceback(None)  # which would hold this frame
            yield conversation, documents, fitting
    finally:
        if isinstance(whole, Generator):  # of which some rows may not have been taken
            whole.close()


def _without_short(fitting: Fitting, least: int | None) -> Fitting:
    """Returns a reason to drop the row if none of its documents has an answer of ``least`` tokens, else ``fitting``
    itself."""
    if least is None:
        return fitting
    kept = [document for part in fitting if not isinstance(part, str) for document in part]
    short = kept and max(longest_answer(document.weights) for document in kept) < least
    return [TOO_SHORT] if short else fitting


def _parts(
    conversation: Conversation,
    whole: Rendered | DataError | None,
    render: Callable[[Conversation], Rendered],
    supervise: str,
) -> list[tuple[Conversation, Rendered]]:
    """Returns a row's documents: the row itself, or one document per turn if that is asked for or needed."""
    return [(conversation, whole)] if isinstance(whole, Rendered) else _per_turn(conversation, whole, render, supervise)


def _per_turn(
    conversation: Conversation, fault: DataError | None, render: Callable[[Conversation], Rendered], supervise: str
) -> list[tuple[Conversation, Rendered]]:
    """Renders a row as one document per turn.

    fault: why the row cannot be one document; it is raised if one per turn fails, too. None if one per turn was asked
    for.
    """
    parts = unrolled(conversation, supervise)
    if fault is None:
        return [(part, render(part)) for part in parts or [conversation]]
    try:
        rendered = [(part, render(part)) for part in parts]
    except DataError:
        rendered = []
    if not rendered:
        raise fault
    return rendered


def _remark(ledger: SourceLedger, conversation: Conversation, documents: list[Rendered], unrolled_for: str) -> None:
    """Notes the remarkable properties and the losses of a kept row, once, however many documents it has."""
    notes = Counter[str]()
    lost = Counter[str]()
    for document in documents:
        notes.update(document.notes)
        lost |= Counter(document.lost)
    notes |= Counter(dict.fromkeys(conversation.get("notes", ()), 1))
    if len(documents) > 1:
        notes[unrolled_for] = 1
    ledger.lose(dict(lost), place(conversation))
    ledger.note(dict(notes), place(conversation))


def _account(
    ledger: SourceLedger, conversation: Conversation, rendered: list[Rendered], fitting: Fitting, overlong: Overlong
) -> None:
    """Counts what `judge` needs to judge the share of supervised tokens and the ends of answers."""
    documents = [document for part in fitting if not isinstance(part, str) for document in part]
    kept = [document.input_ids for document in documents]
    if "text" in conversation:
        ledger.plain += sum(map(len, kept))
        ledger.plain_supervised += sum(document.n_supervised for document in documents)
        return
    ledger.repeated += sum(_common(before, after) for before, after in pairwise(kept))
    ledger.thinking += any(message.get("reasoning") for message in conversation["messages"])
    if overlong == "truncate" and any(map(_cuts_an_answer, rendered, fitting)):
        ledger.unended.add([place(conversation)])


def _common(before: list[int], after: list[int]) -> int:
    """Returns how many tokens two documents begin with alike."""
    return next(
        (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )


def _cuts_an_answer(document: Rendered, fitting: list[Rendered] | str) -> bool:
    """Says whether what is left of ``document`` stops in the middle of an answer.

    A document that is not cut ends properly, because the renderer raises for a turn without an end.
    """
    if isinstance(fitting, str):
        return False
    end = len(fitting[0].input_ids)
    return end < len(document.input_ids) and document.weights[end - 1] > 0 and document.weights[end] > 0


def _render_one(tokenizer: PreTrainedTokenizerBase, options: RenderOptions, conversation: Conversation) -> Rendered:
    return render_conversation(conversation, tokenizer, **options)


def _render_as_prompted(
    tokenizer: PreTrainedTokenizerBase, options: RenderOptions, conversation: Conversation
) -> Rendered:
    """Renders a row with the template by which a runtime prompts, which may rewrite earlier turns.

    Where that one does not tell which text is the turn's, its training version does.
    """
    chat_format = options["chat_format"]
    if chat_format is not None and chat_format.original is not None and "text" not in conversation:
        of_a_runtime: RenderOptions = {**options, "chat_format": as_prompted(chat_format)}
        with suppress(DataError):
            return _render_one(tokenizer, of_a_runtime, conversation)
    return _render_one(tokenizer, options, conversation)


def _weighted(document: Rendered, factor: float) -> Rendered:
    return document if factor == 1 else replace(document, weights=[weight * factor for weight in document.weights])


def _count(ledger: SourceLedger, documents: Documents) -> None:
    of_each = sizes(documents)
    lengths = sorted(of_each.tokens)
    ledger.tokens = sum(lengths)
    ledger.supervised = sum(of_each.supervised)
    if not ledger.whole:
        ledger.answers, ledger.short_answers = answer_counts(documents, FEW)
    if lengths:
        # Nearest rank: the shortest length that this share of the rows does not exceed.
        ledger.p50, ledger.p95, ledger.p99 = (lengths[math.ceil(p * len(lengths)) - 1] for p in (0.5, 0.95, 0.99))
        ledger.longest = lengths[-1]


def _check_mask(source: Source, ledger: SourceLedger, config: DataConfig, documents: int) -> None:
    path, name = source.path, source.name
    if not ledger.kept and source.split:
        reasons = "; ".join(f"{reason}: {dropped.shown}" for reason, dropped in ledger.dropped.items())
        raise DataError(
            f"{path}: the {len(source.rows)} rows that were held out of {name!r} cannot be measured ({reasons}); hold "
            "out a larger share, take another seed, or set held_out: 0% for this source"
        )
    unlabelled = ledger.dropped[NOTHING_SUPERVISED].rows if NOTHING_SUPERVISED in ledger.dropped else 0
    if not ledger.kept and unlabelled == len(source.rows):
        raise DataError(
            f"{path}: no token of {name!r} is supervised; are all assistant turns marked train: false, or weight: 0?"
        )
    undesired = ledger.dropped[UNDESIRED].rows if UNDESIRED in ledger.dropped else 0
    if not ledger.kept and undesired + unlabelled == len(source.rows):
        raise DataError(
            f"{path}: no row of {name!r} is left: {undesired} have label: false, which marks an answer as not wanted; "
            "rename the column if it means something else"
        )
    short = ledger.dropped[TOO_SHORT].rows if TOO_SHORT in ledger.dropped else 0
    if not ledger.kept and short:
        raise DataError(
            f"{path}: no row of {name!r} is left: {short} have no answer of data.min_answer_tokens="
            f"{config.min_answer_tokens} tokens; lower it, or remove the source"
        )
    if not ledger.kept:
        cure = f"raise data.max_length (now {config.max_length}) or shorten them"
        rest = f", except {unlabelled} in which nothing is supervised" if unlabelled else ""
        raise DataError(f"{path}: all {len(source.rows)} conversations of {name!r} are too long{rest}; {cure}")
    # But the first token of every document, which nothing predicts.
    if ledger.supervised >= ledger.tokens - documents and not ledger.whole:
        raise DataError(
            f"{path}: every token of {name!r} is supervised, the prompts too; use another model.chat_template"
        )
