"""Write figures for people: bytes, times, counts, losses."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Writes a number of bytes with three digits: 1.23 GiB, 45.6 MiB."""
    power = 0
    while count >= 1000 and power < 3:
        count, power = count / 1024, power + 1
    digits = 0 if power == 0 or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def duration(seconds: float) -> str:
    """Writes a time in the unit that suits it: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def figure(value: float | None) -> str:
    """Writes a number with about four digits: 0.5321, 12.35, 48,200, 5e-05; a dash where there is none."""
    if value is None:
        return "–"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def share(value: float | None) -> str:
    """Writes a share as percent: 43.1%, 75%; a dash where there is none."""
    return "–" if value is None else f"{value:.1%}".replace(".0%", "%")


def nats(value: float | None) -> str:
    """Writes a loss with three decimals; a dash where there is none."""
    return "–" if value is None else f"{value:,.3f}" if abs(value) < 1e6 else figure(value)
