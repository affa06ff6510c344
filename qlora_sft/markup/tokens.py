"""Draw tokens: what is supervised, what is masked, control tokens, weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qlora_sft.markup.elements import Markup
from qlora_sft.markup.text import escape


@dataclass(frozen=True)
class TokenRun:
    """Holds neighbouring tokens of one kind."""

    text: str
    weight: float
    control: bool


def tokens_html(runs: Iterable[TokenRun]) -> Markup:
    """Returns the text of a document, in which supervised tokens stand out, also on a page that has lost its style."""
    return Markup("".join(map(_run_html, runs)))


def _run_html(run: TokenRun) -> str:
    classes = " ".join(name for name, on in (("s", run.weight > 0), ("c", run.control)) if on)
    weight = f"<sup>×{run.weight:g}</sup>" if run.weight not in (0.0, 1.0) else ""
    text = escape(run.text)
    element = "mark" if run.weight > 0 else "span"
    return weight + (f'<{element} class="{classes}">{text}</{element}>' if classes else text)


def tokens_key() -> Markup:
    """Returns what the ways mean in which tokens are drawn."""
    return Markup(
        '<p class="key tokens"><mark class="s">supervised</mark> <span>masked</span> '
        '<span class="c">control token</span> <span><sup>×0.5</sup> weight of what follows</span></p>'
    )
