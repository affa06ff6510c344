"""Where a command reports what it decides and why: standard error, so that stdout holds results only."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
