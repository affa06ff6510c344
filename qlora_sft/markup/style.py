"""Read the style of our pages."""

from __future__ import annotations

from pathlib import Path

from qlora_sft.markup.elements import Markup


def style() -> str:
    """Returns the style, which stands in every page, so that it needs no other file."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def piece(*parts: str) -> str:
    """Returns parts for a notebook, with the style that they need."""
    return Markup(f'<div class="qsft"><style>{style()}</style>{"".join(parts)}</div>')
