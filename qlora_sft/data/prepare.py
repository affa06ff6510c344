"""Sources -> rendered documents -> bins, with a ledger of what became of every row."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qlora_sft.config import DataConfig
from qlora_sft.data.packing import pack
from qlora_sft.data.read import Source
from qlora_sft.data.render import Rendered, render_many
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError


@dataclass
class SourceLedger:
    """What became of the rows of one source."""

    path: str
    read: int = 0
    kept: int = 0
    too_long: list[int] = field(default_factory=list)
    """Line numbers of the rows that were dropped for their length."""
    tokens: int = 0
    supervised: int = 0
    longest: int = 0

    @property
    def share(self) -> float:
        return self.supervised / self.tokens if self.tokens else 0.0


@dataclass
class Prepared:
    """Documents of one split, by source, and the ledger that accounts for every row."""

    documents: dict[str, list[Rendered]]
    ledger: dict[str, SourceLedger]

    @property
    def all_documents(self) -> list[Rendered]:
        return [document for documents in self.documents.values() for document in documents]


def render_sources(
    sources: list[Source], config: DataConfig, tokenizer: Any, style: ChatFormat | None = None
) -> Prepared:
    """Renders every conversation and accounts for it.

    Raises `DataError` naming file and line, also when a source ends up with 0% or 100% supervised tokens:
    both mean a wrong mask, and both train without complaint.
    """
    prepared = Prepared({}, {})
    for source in sources:
        ledger = SourceLedger(path=str(source.path), read=len(source.rows))
        documents = []
        rendered = render_many(source.rows, tokenizer, source=source.name, style=style)
        for conversation, document in zip(source.rows, rendered, strict=True):
            place = f"{source.path}:{conversation['line']}"
            if isinstance(document, DataError):
                raise DataError(f"{place}: {document}")
            length = len(document.input_ids)
            if length > config.max_length:
                if config.overlong == "error":
                    cure = f"raise data.max_length to {length} or set data.overlong=drop"
                    raise DataError(f"{place}: {length} tokens, more than data.max_length={config.max_length}; {cure}")
                ledger.too_long.append(conversation["line"])
                continue
            documents.append(document)
            ledger.kept += 1
            ledger.tokens += length
            ledger.supervised += document.n_supervised
            ledger.longest = max(ledger.longest, length)
        _check_mask(source, ledger, config)
        prepared.documents[source.name] = documents
        prepared.ledger[source.name] = ledger
    return prepared


def _check_mask(source: Source, ledger: SourceLedger, config: DataConfig) -> None:
    path, name = source.path, source.name
    if not ledger.kept:
        cure = f"raise data.max_length (now {config.max_length}) or shorten them"
        raise DataError(f"{path}: all {ledger.read} conversations of {name!r} are too long; {cure}")
    if ledger.supervised == 0:
        raise DataError(f"{path}: no token of {name!r} is supervised; are all assistant turns marked train: false?")
    if ledger.supervised == ledger.tokens:
        raise DataError(f"{path}: every token of {name!r} is supervised, the prompts too; the chat template is wrong")


def ledger_table(ledger: dict[str, SourceLedger]) -> str:
    """The ledger as text, one line per source."""
    lines = [f"{'source':<16}{'read':>8}{'kept':>8}{'too long':>10}{'tokens':>12}{'supervised':>18}{'longest':>9}"]
    for name, row in ledger.items():
        supervised = f"{row.supervised:,} ({row.share:.1%})"
        lines.append(
            f"{name:<16}{row.read:>8,}{row.kept:>8,}{len(row.too_long):>10,}{row.tokens:>12,}{supervised:>18}{row.longest:>9,}"
        )
        if row.too_long:
            shown = ", ".join(map(str, row.too_long[:3])) + (" ..." if len(row.too_long) > 3 else "")
            lines.append(f"  {name}: dropped as too long: line {shown}")
    return "\n".join(lines)


def plan_bins(
    documents: list[Rendered], config: DataConfig, epochs: int, seed: int, say: Callable[[str], None] = lambda _: None
) -> list[list[int]]:
    """Bins of document indices in training order, all epochs behind one another.

    The same seed gives the same order on every machine. Documents are shuffled before packing, so that documents
    of one length from different sources mix, and the bins are shuffled anew for every epoch.
    """
    order = list(range(len(documents)))
    random.Random(f"documents {seed}").shuffle(order)
    lengths = [len(documents[index].input_ids) for index in order]
    bins = [[order[i] for i in each] for each in pack(lengths, config.max_length, strategy=config.packing)]
    if config.packing != "none":
        filled = sum(lengths) / (len(bins) * config.max_length)
        padded = sum(lengths) / (len(lengths) * max(lengths))
        say(
            f"packing ({config.packing}): {len(documents):,} documents in {len(bins):,} rows of {config.max_length:,} "
            f"tokens, {filled:.1%} filled (one padded row per document: {padded:.1%})"
        )
    planned = []
    for epoch in range(epochs):
        shuffled = list(bins)
        random.Random(f"bins {seed} {epoch}").shuffle(shuffled)
        planned += shuffled
    return planned
