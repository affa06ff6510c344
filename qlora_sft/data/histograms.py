"""Draw the lengths of each source's documents, and the languages of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_sft.data.documents import Documents, sizes
from qlora_sft.data.language import language_of
from qlora_sft.data.render import Rendered
from qlora_sft.markup.bars import Bar, bars
from qlora_sft.markup.elements import Markup, note
from qlora_sft.markup.text import escape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOKED_AT = 1000


def histograms(documents: Mapping[str, Documents], tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Returns the histograms of all sources: tokens per document, and languages of what is supervised."""
    parts = []
    for name, rows in documents.items():
        looked = evenly(rows)
        found = Counter(language_of(supervised_text(row, tokenizer)) for row in looked)
        parts.append(
            f'<div class="panel"><h3>{escape(name)}</h3>{note("tokens per document")}'
            f"{drawn(f'{name}: tokens per document', lengths(sizes(rows).tokens))}"
            f"{note(f'language of what is supervised, guessed, in {len(looked):,} documents')}"
            f"{drawn(f'{name}: languages', found.most_common())}</div>"
        )
    return Markup(f"<h2>what the sources are like</h2>{''.join(parts)}" if parts else "")


def drawn(title: str, counts: Sequence[tuple[str, int]]) -> Markup:
    """Returns one bar per class, with its count and share beside it."""
    total = sum(count for _, count in counts) or 1
    return bars(title, [Bar(name, count, count, f"{count:,} ({count / total:.1%})") for name, count in counts])


def lengths(tokens: Sequence[int]) -> list[tuple[str, int]]:
    """Returns how many documents there are of which length, each class twice as wide as the one before."""
    classes = Counter((length - 1).bit_length() for length in tokens)
    if not classes:
        return []
    every = range(min(classes), max(classes) + 1)
    return [(f"{(1 << (each - 1)) + 1 if each else 1:,} to {1 << each:,}", classes[each]) for each in every]


def evenly(documents: Sequence[Rendered], most: int = _LOOKED_AT) -> list[Rendered]:
    """Returns at most so many documents, spread evenly over all."""
    count = min(most, len(documents))
    return [documents[number * len(documents) // count] for number in range(count)]


def supervised_text(document: Rendered, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of the supervised tokens, without control tokens."""
    ids = [token for token, weight in zip(document.input_ids, document.weights, strict=True) if weight > 0]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text
