"""Draw how long the documents of each source are, and in which languages it answers, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_sft.data.documents import Documents, sizes
from qlora_sft.data.language import language_of
from qlora_sft.data.render import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOKED_AT = 1000
_WIDTH = 40
_BAR = "█"


def histograms(documents: Mapping[str, Documents], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the histograms of all sources: tokens per document, and languages of what is supervised."""
    parts = []
    for name, rows in documents.items():
        parts.append(f"{name}: tokens per document\n" + bars(lengths(sizes(rows).tokens)))
        looked = evenly(rows)
        found = Counter(language_of(supervised_text(row, tokenizer)) for row in looked)
        parts.append(
            f"{name}: language of what is supervised, guessed, in {len(looked):,} documents\n"
            + bars(found.most_common())
        )
    return "\n\n".join(parts)


def lengths(tokens: Sequence[int]) -> list[tuple[str, int]]:
    """Returns how many documents there are of which length, each class twice as wide as the one before."""
    classes = Counter((length - 1).bit_length() for length in tokens)
    if not classes:
        return []
    every = range(min(classes), max(classes) + 1)
    return [(f"{(1 << (each - 1)) + 1 if each else 1:,} to {1 << each:,}", classes[each]) for each in every]


def bars(counts: Sequence[tuple[str, int]]) -> str:
    """Returns one line per class: its name, a bar, its count and share."""
    total, most = sum(count for _, count in counts) or 1, max((count for _, count in counts), default=1)
    width = max((len(name) for name, _ in counts), default=0)
    return "\n".join(
        f"  {name:>{width}} {_BAR * -(-_WIDTH * count // most):<{_WIDTH}} {count:,} ({count / total:.1%})"
        for name, count in counts
    )


def evenly(documents: Sequence[Rendered], most: int = _LOOKED_AT) -> list[Rendered]:
    """Returns at most so many documents, spread evenly over all."""
    count = min(most, len(documents))
    return [documents[number * len(documents) // count] for number in range(count)]


def supervised_text(document: Rendered, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of the supervised tokens, without control tokens."""
    ids = [token for token, weight in zip(document.input_ids, document.weights, strict=True) if weight > 0]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text
