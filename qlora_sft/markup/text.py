"""Make any text harmless in a web page: markup is escaped, and characters that would hide or turn text are shown."""

from __future__ import annotations

import html
import re
import unicodedata

# Controls but tab and line feed, marks that turn the direction of text, invisible characters, and halves of surrogates.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape(text: object) -> str:
    """Returns ``text`` for the content of an element. Hidden characters stand there by their code, marked as such."""
    return _HIDDEN.sub(lambda found: f'<span class="u">{_code(found[0])}</span>', html.escape(str(text)))


def attribute(text: object) -> str:
    """Returns ``text`` for a quoted attribute or a title, in which there can be no elements."""
    return _HIDDEN.sub(lambda found: f"[{_code(found[0])}]", html.escape(str(text)))


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"


def shortened(text: str, most: int) -> str:
    """Returns ``text``, with its middle left out and counted where it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    begin, end = most * 2 // 3, most // 3
    while end and unicodedata.combining(text[-end]):  # which would be drawn on the note
        end -= 1
    return f"{text[:begin]} [… {len(text) - begin - end:,} characters …] {text[len(text) - end :]}"
