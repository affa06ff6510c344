"""Report what a command decides, and how far it has come, on standard error, so that stdout holds results only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from qlora_sft.parallel import rank

if TYPE_CHECKING:
    from tqdm import tqdm

Say = Callable[[str], None]
# Seconds between two lines of a log that say how far something is.
INTERVAL = 20.0


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


class _Lines:
    """Passes every state of a bar on to a stream as a line of its own, where a bar would draw it over the last one."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        if text.strip():
            self._stream.write(text.strip() + "\n")
        return len(text)

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

    A log file gets a line every 20 seconds instead of a bar that redraws itself, as a terminal and a notebook do. Of
    several processes that train together the first one has it.
    """
    from tqdm import tqdm

    redrawn = sys.stderr.isatty()
    settings: dict[str, Any] = {"total": total, "desc": what, "unit": unit, "delay": delay}
    if not redrawn and not in_notebook():
        return tqdm(
            **settings, file=cast(TextIO, _Lines(sys.stderr)), mininterval=INTERVAL, leave=False, disable=rank() > 0,
            bar_format="{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} left",
        )  # fmt: skip
    return tqdm(
        **settings, file=sys.stderr, dynamic_ncols=True, mininterval=0.1 if redrawn else 1.0, leave=False,
        disable=rank() > 0,
    )  # fmt: skip


def in_notebook() -> bool:
    """Says whether this runs in the kernel of a notebook, which shows a line that redraws itself as a terminal does."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")  # the second is Colab's
