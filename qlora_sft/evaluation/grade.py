"""What counts as the same answer."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

GSM8K_MARK = "#### "
# A minus between two numbers is no sign.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def said(text: str, thinking: bool = False) -> str:
    """The answer without the thinking before it; one that never stopped thinking has said nothing.

    thinking: whether the prompt has opened the thought already.
    """
    _, ended, answer = text.rpartition("</think>")
    if not ended and (thinking or text.lstrip().startswith("<think>")):
        return ""
    return answer.strip()


def last_number(text: str) -> str | None:
    """The number an answer ends in, in plain digits: behind ``####``, in the last ``\\boxed{}``, or the last of all.

    ``$1,234.50`` is ``1234.5``; None if there is no number.
    """
    if GSM8K_MARK in text:
        text = text.rpartition(GSM8K_MARK)[2]
        found = _NUMBER.findall(text)[:1]
    else:
        boxed = _BOXED.findall(text)
        found = _NUMBER.findall(boxed[-1] if boxed else text)[-1:]
    if not found:
        return None
    try:
        number = Decimal(found[0].replace(",", ""))
    except InvalidOperation:
        return None
    return format(number.normalize() + 0, "f")  # + 0: no minus zero
