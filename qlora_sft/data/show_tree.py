"""Draw the tree of the prefixes that the documents of a packed sequence share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_sft.data.prefix_tree import PrefixTree, prefix_tree
from qlora_sft.data.render import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters of a segment's text that are shown, and documents of a segment that are drawn one by one.
SHOWN, DRAWN = 60, 4


def draw_tree(documents: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the tree as text, one line per segment, what continues a segment below it and further to the right."""
    rows = [np.asarray(document.input_ids, dtype=np.int32) for document in documents]
    tree = prefix_tree(rows)
    before, after = sum(map(len, rows)), sum(tree.lengths)
    head = f"{len(rows)} documents, {before:,} tokens; computed once where they are shared: {after:,}"
    return "\n".join([head, *_lines(tree, documents, tokenizer)])


def _lines(tree: PrefixTree, documents: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    through = [sum(number in path for path in tree.paths) for number in range(len(tree.segments))]
    depth: list[int] = []
    drawn: dict[int, int] = {}
    for number, segment in enumerate(tree.segments):
        depth.append(depth[segment.parent] + 1 if segment.parent >= 0 else 0)
        if through[number] == 1:
            drawn[segment.parent] = drawn.get(segment.parent, 0) + 1
            if segment.parent >= 0 and drawn[segment.parent] > DRAWN:
                continue
        document = documents[segment.row]
        text = tokenizer.decode(document.input_ids[segment.start : segment.end])
        short = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
        count = f"shared by {through[number]} documents" if through[number] > 1 else f"{document.source}"
        supervised = sum(weight > 0 for weight in document.weights[segment.start : segment.end])
        marks = f", {supervised} supervised" if through[number] == 1 else ""
        yield f"{'   ' * depth[number]}└─ {len(segment):,} tokens, {count}{marks}: {short!r}"
    for parent, alone in drawn.items():
        if parent >= 0 and alone > DRAWN:
            yield f"({alone - DRAWN} more that continue the segment of {len(tree.segments[parent]):,} tokens alone)"
