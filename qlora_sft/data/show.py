"""Show what is trained: supervised tokens, masked ones, control tokens, weights, document bounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from qlora_sft.data.render import Rendered
from qlora_sft.data.shield import control_tokens
from qlora_sft.data.show_tree import draw_tree
from qlora_sft.markup.elements import Markup, note, page, preformatted
from qlora_sft.markup.style import piece, style
from qlora_sft.markup.text import escape
from qlora_sft.markup.tokens import TokenRun, tokens_html, tokens_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEN, DIM, CYAN, BOLD, RESET = "\x1b[32m", "\x1b[2m", "\x1b[36m", "\x1b[1m", "\x1b[0m"


def token_runs(document: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[TokenRun]:
    """Returns the document's tokens, in order, joined while weight and kind stay the same."""
    control = set(tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer))))
    tokens = [(i, weight, i in control) for i, weight in zip(document.input_ids, document.weights, strict=True)]
    return [
        TokenRun(tokenizer.decode([i for i, _, _ in group]), weight, is_control)
        for (weight, is_control), group in groupby(tokens, key=lambda token: token[1:])
    ]


def caption(document: Rendered) -> str:
    return f"{document.source}: {len(document.input_ids)} tokens, {document.n_supervised} supervised"


def as_text(
    sequences: Iterable[list[Rendered]], tokenizer: PreTrainedTokenizerBase, colour: bool, trees: bool = False
) -> str:
    """Returns the packed documents for a terminal: supervised green, masked dim, control tokens cyan.

    Without colour, supervised tokens stand in [[ ]]. trees: whether the documents of a sequence share prefixes, whose
    tree is then drawn.
    """
    lines = []
    for number, documents in enumerate(sequences):
        total = sum(len(document.input_ids) for document in documents)
        lines.append(_paint(f"━━ packed sequence {number}: {len(documents)} documents, {total} tokens", BOLD, colour))
        if trees:
            lines.append(draw_tree(documents, tokenizer))
        for document in documents:
            lines.append(_paint(f"── {caption(document)}", BOLD, colour))
            lines.append("".join(_run_as_text(run, colour) for run in token_runs(document, tokenizer)))
    return "\n".join(lines)


def _run_as_text(run: TokenRun, colour: bool) -> str:
    weight = f"×{run.weight:g} " if run.weight not in (0.0, 1.0) else ""
    if not colour:
        return f"[[{weight}{run.text}]]" if run.weight else run.text
    tone = GREEN if run.weight else DIM
    return weight + _paint(run.text, tone + CYAN if run.control and not run.weight else tone, colour)


def _paint(text: str, tone: str, colour: bool) -> str:
    return f"{tone}{text}{RESET}" if colour else text


def as_page(
    sequences: Iterable[list[Rendered]],
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    above: Sequence[str],
    trees: bool = False,
) -> str:
    """Returns a web page of its own, without scripts or links, that reads well on a phone.

    above: texts, or what is written as `Markup` already, that stand before the documents.
    """
    told = (each if isinstance(each, Markup) else preformatted(each) for each in above)
    head = [Markup(f"<h1>{escape(title)}</h1>"), *told]
    return page(title, style(), "\n".join([*head, *_boxes(sequences, tokenizer, trees)]))


def as_piece(sequences: Iterable[list[Rendered]], tokenizer: PreTrainedTokenizerBase, trees: bool = False) -> str:
    """Returns the packed documents for a notebook."""
    return piece(*_boxes(sequences, tokenizer, trees))


def _boxes(sequences: Iterable[list[Rendered]], tokenizer: PreTrainedTokenizerBase, trees: bool) -> Iterator[Markup]:
    yield tokens_key()
    yield note("A box is a packed sequence; its documents do not see each other.")
    for number, documents in enumerate(sequences):
        shown = "".join(
            f'<div class="tokens" dir="auto"><small>{escape(caption(document))}</small>'
            f"{tokens_html(token_runs(document, tokenizer))}</div>"
            for document in documents
        )
        tree = preformatted(draw_tree(documents, tokenizer)) if trees else ""
        yield Markup(f'<h2>packed sequence {number}</h2><div class="panel">{tree}{shown}</div>')
