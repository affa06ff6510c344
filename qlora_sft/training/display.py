"""Shows how far training is: a line that redraws itself in a terminal or a notebook, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from tqdm import tqdm

from qlora_sft.say import Say

# Seconds between two lines of a log.
INTERVAL = 20.0
# Characters of the line in a notebook, which has no width of its own.
NOTEBOOK_WIDTH = 110


class Display:
    """Draws the progress of a run on stderr, and lets other lines pass without tearing it."""

    def __init__(self, steps: int, begin: int, say: Say):
        """Takes the number of ``steps`` of the run and how many are done; ``say`` prints all other lines."""
        self.steps, self.begin, self._say = steps, begin, say
        self._bar: Any = None
        self._started = self._shown = time.monotonic()

    def open(self) -> None:
        """Begins to draw, and to count the time."""
        self._started = self._shown = time.monotonic()
        if sys.stderr.isatty() or in_notebook():
            self._bar = tqdm(
                total=self.steps, initial=self.begin, desc="train", unit="step", file=sys.stderr,
                dynamic_ncols=sys.stderr.isatty(), ncols=None if sys.stderr.isatty() else NOTEBOOK_WIDTH,
                mininterval=0.1 if sys.stderr.isatty() else 0.5,
            )  # fmt: skip

    def update(self, step: int, text: str) -> None:
        """Shows that ``step`` is done, and ``text`` about it. A log gets a line now and then, and of the last step."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._shown >= INTERVAL or step == self.steps:
            self._shown = now
            left = (now - self._started) / max(1, step - self.begin) * (self.steps - step)
            self._say(f"step {step}/{self.steps}: {text}" + (f", {tqdm.format_interval(left)} left" if left else ""))

    def say(self, text: str) -> None:
        """Prints a line above the one that redraws itself."""
        drawn = tqdm.external_write_mode(file=sys.stderr) if self._bar is not None else contextlib.nullcontext()
        with drawn:
            self._say(text)

    def close(self) -> None:
        """Leaves the line as it is."""
        if self._bar is not None:
            self._bar.close()


def in_notebook() -> bool:
    """Says whether this runs in the kernel of a notebook, which shows a line that redraws itself as a terminal does."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")  # the second is Colab's
