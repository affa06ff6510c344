"""Extracts from an answer what is graded, so that equal answers become equal texts."""

from __future__ import annotations

import re
from decimal import Decimal

# A minus between two numbers is no sign of the second one.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
# A GSM8K answer ends with such a line. A heading of the fourth order (#### Step 2: ...) does not match.
_MARKED = re.compile(rf"^####[ \t]*[^\w\n+-]*({_NUMBER.pattern})\W*$", re.MULTILINE)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# TeX separates thousands by such marks: 1{,}234, 70\,000, 70,\!000.
_SPACES = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!;:])(?=\d{3})")
# TeX writes units with their exponents like this: 18\text{ m}^2.
_UNITS = re.compile(r"\\(?:text|mathrm|textbf)\{[^{}]*\}(?:\^\{?\d+\}?)?")


def said(text: str, thinking: bool = False) -> str:
    """Returns the answer without the thinking before it. An answer that never ends its thought is empty.

    thinking: whether the prompt has opened the thought already.
    """
    _, ended, answer = text.rpartition("</think>")
    if not ended and (thinking or text.lstrip().startswith("<think>")):
        return ""
    return answer


def marked_number(text: str) -> str | None:
    """Returns the number on the last line of the form ``#### 18``, or None if there is no such line."""
    found = _MARKED.findall(text)
    return _plain(found[-1]) if found else None


def last_number(text: str) -> str | None:
    """Returns the number in which an answer ends, in plain digits: ``$1,234.50`` becomes ``1234.5``.

    It is the number behind ``####``, else the one in the last ``\\boxed{}``, else the last of all. Returns None if
    there is no number.
    """
    marked = marked_number(text)
    if marked is not None:
        return marked
    text = _SPACES.sub(",", text)
    boxed = _BOXED.findall(text)[-1:]
    # Some models put the number into \\text{} inside the box.
    for place in (*(_UNITS.sub(" ", box) for box in boxed), *boxed, text):
        found = _NUMBER.findall(place)
        if found:
            return _plain(found[-1])
    return None


def _plain(number: str) -> str:
    return format(Decimal(number.replace(",", "")).normalize() + 0, "f")  # + 0: no minus zero
