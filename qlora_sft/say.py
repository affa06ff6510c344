"""Report what a command decides, and how far it has come, on standard error, so that stdout holds results only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from qlora_sft.parallel import rank

if TYPE_CHECKING:
    from tqdm import tqdm

Say = Callable[[str], None]


def tell(text: str) -> None:
    """Prints ``text`` to standard error at once."""
    print(text, file=sys.stderr, flush=True)


def progress(total: int, what: str, unit: str, delay: float = 5.0) -> tqdm:
    """Returns a bar on standard error that appears if ``what`` takes longer than ``delay`` seconds; close it.

    A log file gets a line every 20 seconds instead of a bar that redraws itself. Of several processes that train
    together the first one has it.
    """
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=total, desc=what, unit=unit, file=sys.stderr, dynamic_ncols=True, mininterval=interval, delay=delay,
        leave=False, disable=rank() > 0,
    )  # fmt: skip
