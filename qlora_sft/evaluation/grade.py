"""What counts as the same answer."""

from __future__ import annotations

import re
from decimal import Decimal

# A minus between two numbers is no sign.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
# GSM8K ends with such a line. A heading of the fourth order (#### Step 2: ...) is none.
_MARKED = re.compile(rf"^####[ \t]*[^\w\n+-]*({_NUMBER.pattern})\W*$", re.MULTILINE)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# TeX between the thousands: 1{,}234, 70\,000, 70,\!000.
_SPACES = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!;:])(?=\d{3})")
# Units with their exponents: 18\text{ m}^2.
_UNITS = re.compile(r"\\(?:text|mathrm|textbf)\{[^{}]*\}(?:\^\{?\d+\}?)?")


def said(text: str, thinking: bool = False) -> str:
    """The answer without the thinking before it; one that never stopped thinking has said nothing.

    thinking: whether the prompt has opened the thought already.
    """
    _, ended, answer = text.rpartition("</think>")
    if not ended and (thinking or text.lstrip().startswith("<think>")):
        return ""
    return answer


def marked_number(text: str) -> str | None:
    """The number on the last line of the form ``#### 18``."""
    found = _MARKED.findall(text)
    return _plain(found[-1]) if found else None


def last_number(text: str) -> str | None:
    """The number an answer ends in, in plain digits: behind ``####``, in the last ``\\boxed{}``, or the last of all.

    ``$1,234.50`` is ``1234.5``; None if there is no number.
    """
    marked = marked_number(text)
    if marked is not None:
        return marked
    text = _SPACES.sub(",", text)
    boxed = _BOXED.findall(text)[-1:]
    # Some box the number in \\text{}, too.
    for place in (*(_UNITS.sub(" ", box) for box in boxed), *boxed, text):
        found = _NUMBER.findall(place)
        if found:
            return _plain(found[-1])
    return None


def _plain(number: str) -> str:
    return format(Decimal(number.replace(",", "")).normalize() + 0, "f")  # + 0: no minus zero
