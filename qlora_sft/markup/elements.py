"""Write the small pieces of a page: tables, cards, sections, what opens. Plain texts are escaped; `Markup` is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qlora_sft.markup.text import attribute, escape


class Markup(str):
    """Is a piece of a page that is written already, so it is not escaped once more."""

    __slots__ = ()


def content(value: object) -> str:
    """Returns ``value`` for the content of an element: `Markup` as it is, anything else escaped."""
    return value if isinstance(value, Markup) else escape(value)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], left: int = 1) -> Markup:
    """Returns a table that scrolls by itself where the page is narrow.

    left: how many columns are text; the others are figures.
    """
    sides = ["" if number < left else ' class="n"' for number in range(len(head))]
    top = "".join(f'<th scope="col"{side}>{content(each)}</th>' for side, each in zip(sides, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{content(each)}</td>" for side, each in zip(sides, row, strict=True)) + "</tr>"
        for row in rows
    )
    return Markup(
        f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def facts(pairs: Iterable[tuple[object, object]]) -> Markup:
    """Returns names with what is said of them."""
    return Markup(
        '<dl class="facts">'
        + "".join(f"<div><dt>{content(name)}</dt><dd>{content(value)}</dd></div>" for name, value in pairs)
        + "</dl>"
    )


def cards(figures: Iterable[tuple[str, object, str]]) -> Markup:
    """Returns figures side by side. figures: what it is, the figure, and what is to be said about it."""
    return Markup(
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span>{escape(name)}</span><b>{content(value)}</b><small>{escape(note)}</small></div>'
            for name, value, note in figures
        )
        + "</div>"
    )


def change(before: str, after: str) -> Markup:
    """Returns a figure before and after."""
    return Markup(f'<span class="before">{escape(before)}</span> <i>→</i> {escape(after)}')


def section(name: str, title: str, *parts: str) -> Markup:
    """Returns a part of a page with a heading; nothing if there is nothing in it. name: what a link to it says."""
    body = "".join(parts)
    return Markup(f'<section id="{attribute(name)}"><h2>{escape(title)}</h2>{body}</section>' if body else "")


def opens(title: object, *parts: str, at_first: bool = False) -> Markup:
    """Returns what is shown when its title is clicked. at_first: whether it is open from the beginning."""
    state = " open" if at_first else ""
    return Markup(f"<details{state}><summary>{content(title)}</summary>{''.join(parts)}</details>")


def note(text: str) -> Markup:
    """Returns a remark below or above a figure."""
    return Markup(f'<p class="note">{escape(text)}</p>')


def preformatted(text: str) -> Markup:
    """Returns ``text`` with its line breaks and columns."""
    return Markup(f'<pre tabindex="0">{escape(text)}</pre>')


def chip(text: str, kind: str = "") -> Markup:
    """Returns a short word in a frame. kind: good, bad or nothing."""
    return Markup(
        f'<span class="chip {kind}">{escape(text)}</span>' if kind else f'<span class="chip">{escape(text)}</span>'
    )


def page(title: str, style: str, body: str) -> str:
    """Returns a whole page, which needs no other file and runs no script."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{attribute(title)}</title>\n<style>\n{style}</style></head>\n"
        f'<body class="qsft">\n{body}\n</body></html>\n'
    )
