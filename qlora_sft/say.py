"""Report what a command decides, and how far it has come, on standard error, so that stdout holds results only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, cast

from qlora_sft.parallel import rank

if TYPE_CHECKING:
    from tqdm import tqdm

Say = Callable[[str], None]


def tell(text: str) -> None:
    """Prints ``text`` to standard error at once."""
    print(text, file=sys.stderr, flush=True)


class _Unfailing:
    """Passes what is written on to a stream, and drops what the stream does not take."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def unfailing_messages() -> Iterator[None]:
    """Lets its body go on where standard error takes nothing any more: the terminal is gone, or the disk of its log is
    full. That is no reason to lose what is being done."""
    with contextlib.redirect_stderr(cast(TextIO, _Unfailing(sys.stderr))):
        yield


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
