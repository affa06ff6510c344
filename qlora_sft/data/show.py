"""Show what is trained: supervised tokens, masked ones, control tokens, weights, document bounds."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qlora_sft.data.render import Rendered
from qlora_sft.data.shield import control_tokens
from qlora_sft.data.show_tree import draw_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEN, DIM, CYAN, BOLD, RESET = "\x1b[32m", "\x1b[2m", "\x1b[36m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class TokenRun:
    """Holds neighbouring tokens of one kind."""

    text: str
    weight: float
    control: bool


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


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; margin: 1.5rem 0 .3rem }}
pre {{ overflow-x: auto; font-size: .8rem }}
.row {{ border: 2px solid #8886; border-radius: .6rem; padding: 0 .8rem .6rem; margin: 1rem 0 }}
.doc {{ border-top: 1px dashed #888; white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem 0;
  font: .85rem/1.45 ui-monospace, monospace; color: #777 }}
.doc small {{ display: block; color: #888; font-family: system-ui, sans-serif }}
.s {{ color: #0a6b2d; background: #1db95422 }} .c {{ font-weight: bold; border-bottom: 1px solid currentColor }}
@media (prefers-color-scheme: dark) {{ .s {{ color: #7ee29b }} }}
sup {{ color: #b35900 }}
</style></head><body><h1>{title}</h1>
<p><span class="s">supervised</span>, <span style="color:#777">masked</span>, <span class="c">control token</span>,
<sup>×0.5</sup> weight of what follows. A box is a packed sequence; its documents do not see each other.</p>
<pre>{tables}</pre>
{rows}
</body></html>
"""


def as_page(
    sequences: Iterable[list[Rendered]],
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    tables: str,
    trees: bool = False,
) -> str:
    """Returns a web page of its own, without scripts or links, that reads well on a phone."""
    rows = []
    for number, documents in enumerate(sequences):
        shown = "".join(
            f'<div class="doc"><small>{html.escape(caption(document))}</small>'
            + "".join(_run_as_html(run) for run in token_runs(document, tokenizer))
            + "</div>"
            for document in documents
        )
        tree = f"<pre>{html.escape(draw_tree(documents, tokenizer))}</pre>" if trees else ""
        rows.append(f'<div class="row"><h2>packed sequence {number}</h2>{tree}{shown}</div>')
    return _PAGE.format(title=html.escape(title), tables=html.escape(tables), rows="\n".join(rows))


def _run_as_html(run: TokenRun) -> str:
    classes = " ".join(name for name, on in (("s", run.weight > 0), ("c", run.control)) if on)
    weight = f"<sup>×{run.weight:g}</sup>" if run.weight not in (0.0, 1.0) else ""
    text = html.escape(run.text)
    return weight + (f'<span class="{classes}">{text}</span>' if classes else text)
