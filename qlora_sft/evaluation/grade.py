"""Extracts from an answer what is graded, so that equal answers become equal texts."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

# Digits, with thousands (or, in India, hundreds of them) set off, or decimals alone; a power of ten behind them.
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"
# A minus between two numbers is no sign of the second one. A part of a date is no fraction.
_NUMBER = re.compile(rf"(?:(?<![\w.)])[-+])?(?:(?<![\d/])(?:\d+ )?\d+/\d+(?![\d/])|{_UNSIGNED})")
# A GSM8K answer ends with such a line. A heading of the fourth order (#### Step 2: ...) does not match.
_MARKED = re.compile(rf"^####[ \t]*[^\w\n+-]*({_NUMBER.pattern})\W*$", re.MULTILINE)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# TeX separates thousands by such marks: 1{,}234, 70\,000, 70,\!000.
_SPACES = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!;:]|[\u00a0\u2009\u202f])(?=\d{3})")
_FRACTIONS = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
# What stands between a sign and its number: -$5, -\$5.
_CURRENCY = re.compile(r"(?<![\w.)])([-+])\\?[$€£](?=[\d.])")
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
    found = _MARKED.findall(_with_signs(text))
    return _plain(found[-1]) if found else None


def last_number(text: str) -> str | None:
    """Returns the number in which an answer ends, in plain digits: ``$1,234.50`` becomes ``1234.5``.

    It is the number behind ``####``, else the one in the last ``\\boxed{}``, else the last of all. A fraction becomes a
    decimal where that has an end. Returns None if there is no number.
    """
    marked = marked_number(text)
    if marked is not None:
        return marked
    text = _FRACTIONS.sub(r"\1/\2", _SPACES.sub(",", _with_signs(text)))
    boxed = _BOXED.findall(text)[-1:]
    # Some models put the number into \\text{} inside the box.
    for place in (*(_UNITS.sub(" ", box) for box in boxed), *boxed, text):
        found = _NUMBER.findall(place)
        if found:
            return _plain(found[-1])
    return None


def _with_signs(text: str) -> str:
    """Returns ``text`` with every minus as a hyphen, directly before its number."""
    return _CURRENCY.sub(r"\1", text.replace("\u2212", "-"))


def _plain(number: str) -> str:
    if "/" not in number:
        return format(Decimal(number.replace(",", "")).normalize() + 0, "f")  # + 0: no minus zero
    whole, _, part = number.lstrip("+-").rpartition(" ")
    above, below = map(int, part.split("/"))
    if not below:
        return number
    value = (int(whole or 0) + Fraction(above, below)) * (-1 if number.startswith("-") else 1)
    rest = value.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    if rest > 1:
        return f"{value.numerator}/{value.denominator}"
    return _plain(str(Decimal(value.numerator) / Decimal(value.denominator)))
