"""Report what a command decides and why on standard error, so that stdout holds results only."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]


def tell(text: str) -> None:
    """Prints ``text`` to standard error at once."""
    print(text, file=sys.stderr, flush=True)
