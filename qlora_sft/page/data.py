"""Show what a run was trained on: the mixture, the ledger, and documents in which supervised tokens are highlighted."""

from __future__ import annotations

from qlora_sft.json_types import JsonObject, items, mapping, number
from qlora_sft.markup.bars import Bar, bars
from qlora_sft.markup.elements import Markup, note, opens, table
from qlora_sft.markup.text import escape
from qlora_sft.markup.tokens import TokenRun, tokens_html, tokens_key
from qlora_sft.page.facts import RunFacts
from qlora_sft.units import share

SHOWN = 3


def mixture(run: RunFacts) -> Markup:
    """Returns the tokens of every source that the steps of the run are made of, the supervised ones filled."""
    sources = {name: mapping(each) for name, each in mapping(run.trained_on.get("mixture")).items()}
    said = "Tokens of the packed sequences that the steps of this run are made of. Dark: supervised."
    if not sources:
        sources = {name: mapping(each) for name, each in mapping(run.manifest.get("data")).items()}
        said = "Tokens of the rows that were kept of every source, as they were read. Dark: supervised."
    whole = sum(_count(each, "tokens") for each in sources.values())
    rows = [
        Bar(
            name, _count(each, "tokens"), _count(each, "supervised"),
            f"{_count(each, 'tokens'):,.0f} ({share(_count(each, 'tokens') / whole)}), "
            f"{share(_count(each, 'supervised') / (_count(each, 'tokens') or 1))} supervised",
        )
        for name, each in sources.items()
    ] if whole else []  # fmt: skip
    return Markup(f'<div class="panel">{bars("tokens by source", rows)}</div>{note(said)}' if rows else "")


def ledger(run: RunFacts) -> Markup:
    """Returns what became of the rows of every source."""
    sources = {name: mapping(each) for name, each in mapping(run.manifest.get("data")).items()}
    if not sources:
        return Markup("")
    head = ["source", "read", "kept", "dropped", "tokens", "supervised", "median", "p95", "longest"]
    rows = [
        [
            name,
            *(f"{_count(each, key):,.0f}" for key in ("read", "kept")),
            f"{sum(_count(mapping(drop), 'rows') for drop in mapping(each.get('dropped')).values()):,.0f}",
            f"{_count(each, 'tokens'):,.0f}",
            f"{_count(each, 'supervised'):,.0f} ({share(number(each.get('share')))})",
            *(f"{_count(each, key):,.0f}" for key in ("p50", "p95", "longest")),
        ]
        for name, each in sources.items()
    ]
    remarks = [
        [name, what, f"{rows_of:,.0f}", where]
        for name, each in sources.items()
        for what, rows_of, where in _remarks(each)
    ]
    below = table(["source", "what", "rows", "where"], remarks, left=2) if remarks else ""
    return Markup(f'<h3>Ledger</h3><div class="panel">{table(head, rows)}{below}</div>')


def _remarks(source: JsonObject) -> list[tuple[str, float, str]]:
    """Returns what is to be said of the rows of a source: what, how many rows, and the first of them."""
    found = [(f"dropped: {why}", mapping(drop)) for why, drop in mapping(source.get("dropped")).items()]
    found += [(what, mapping(each)) for what, each in mapping(source.get("notes")).items()]
    if mapping(source.get("lost")):
        found.append(
            (f"characters without a token: {''.join(mapping(source.get('lost')))[:40]}", mapping(source.get("lost_in")))
        )
    rows = [(what, _count(each, "rows"), ", ".join(map(str, items(each.get("first"))))) for what, each in found]
    for key, what in (("not_drawn", "not drawn (fraction, max_rows)"), ("shortened", "shortened or split to fit")):
        if _count(source, key):
            rows.append((what, _count(source, key), ""))
    return rows


def mask_sample(run: RunFacts) -> Markup:
    """Returns documents of the run as training saw them, the first of every source."""
    documents = [mapping(each) for each in items(run.trained_on.get("documents"))]
    drawn = [_document(each) for each in documents]
    if not drawn:
        return Markup("")
    more = opens(f"{len(drawn) - SHOWN} more sources", *drawn[SHOWN:]) if len(drawn) > SHOWN else ""
    return Markup(
        f"{tokens_key()}{note('The first document of every source, as it was trained on.')}"
        f'<div class="panel">{"".join(drawn[:SHOWN])}{more}</div>'
    )


def _document(document: JsonObject) -> str:
    pieces = [mapping(each) for each in items(document.get("pieces"))]
    runs = [
        TokenRun(str(each.get("text", "")), number(each.get("weight")) or 0.0, bool(each.get("control")))
        for each in pieces
    ]
    said = f"{_count(document, 'tokens'):,.0f} tokens, {_count(document, 'supervised'):,.0f} supervised"
    cut = " (shortened here)" if document.get("shortened") else ""
    return (
        f'<div class="tokens" dir="auto"><small>{escape(document.get("source"))}: {escape(said)}{cut}</small>'
        f"{tokens_html(runs)}</div>"
    )


def _count(source: JsonObject, key: str) -> float:
    return number(source.get(key)) or 0.0
