"""Show what a configuration will train on, before anything is trained (``qlora-sft preview``)."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.config import Config
from qlora_sft.json_types import JsonObject
from qlora_sft.prepare import prepare
from qlora_sft.run.report import ONLY_HERE, Report
from qlora_sft.say import tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_sft.data.render import Rendered


@dataclass(frozen=True)
class ShownDocument(Report):
    """Shows a document as training sees it, token by token."""

    source: str
    ids: list[int]
    tokens: list[str]
    supervised: list[bool]
    weights: list[float]


@dataclass(frozen=True)
class PreviewReport(Report):
    """Holds the documents that were shown, the ledger of every source, and what the data is judged by."""

    rows: list[ShownDocument]
    ledger: dict[str, JsonObject]
    findings: list[JsonObject] = field(default_factory=list)
    """Level, kind, source and text of each warning; an error ends the preview as it would end the training."""
    html: str = field(default="", repr=False, metadata=ONLY_HERE)
    """The documents for a notebook."""

    def _repr_html_(self) -> str:
        return self.html


def preview(
    config: Config, count: int = 3, page: str | None = None, show: bool = True, *, alone: bool = False
) -> PreviewReport:
    """Shows what `train` would train on with the same configuration, and returns it.

    What became of the rows, and the mixture, go to stderr. The first ``count`` documents go to stdout, as they are
    packed.

    page: also writes a web page to this file.
    show: whether the documents are printed.
    alone: nothing is trained in this process later, so Unsloth, which must be imported first, need not be imported.

    Raises `ConfigError` or `DataError`, the same ones as `train`.
    """
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        tell(text)

    data = prepare(config, say, unsloth=not alone)
    from qlora_sft.data.show import as_page, as_piece, as_text

    documents, tokenizer, trees = data.documents, data.tokenizer, data.packed.shares_prefixes
    shown = first_documents(data.sequences, count)
    packed = [[documents[index] for index in each] for each in shown]
    among = sum(len(each) for each in data.sequences[: len(shown)])
    if count < among:
        say(
            f"shown: {count} of the {among:,} documents of the first {len(shown):,} of {len(data.sequences):,} packed "
            "sequences; --count shows more"
        )
    if page:
        from qlora_sft.atomic import written_file
        from qlora_sft.data.histograms import histograms

        title, pictures = f"{config.output}: what is trained", histograms(data.train.documents, tokenizer)
        with written_file(Path(page)) as beside:
            beside.write_text(as_page(packed, tokenizer, title, ["\n\n".join(said), pictures], trees), "utf-8")
        tell(f"wrote {page}; open it in a browser")
    if show:  # last, because the reader of a pipe may have seen enough before its end
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        if shown:
            tell(f"trained is what {'is green' if colour else 'stands in [[ ]]'}, and nothing else")
        print(as_text(packed, tokenizer, colour=colour, trees=trees))
    rows = [_shown(document, tokenizer) for each in packed for document in each]
    ledger = {name: {**asdict(row), "share": row.share} for name, row in data.train.ledger.items()}
    findings = [asdict(finding) for finding in data.findings]
    return PreviewReport(rows, ledger, findings, as_piece(packed, tokenizer, trees))


def _shown(document: Rendered, tokenizer: PreTrainedTokenizerBase) -> ShownDocument:
    tokens = tokenizer.convert_ids_to_tokens(document.input_ids)
    supervised = [weight > 0 for weight in document.weights]
    return ShownDocument(document.source, document.input_ids, tokens, supervised, document.weights)


def first_documents(sequences: list[list[int]], count: int) -> list[list[int]]:
    """Returns the first packed sequences, the last of them cut so that there are ``count`` documents in all."""
    shown: list[list[int]] = []
    for each in sequences:
        if count <= 0:
            break
        shown.append(each[:count])
        count -= len(each)
    return shown
