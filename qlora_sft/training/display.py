"""Shows how far training is: a line that redraws itself in a terminal or a notebook, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from tqdm import tqdm

from qlora_sft.say import INTERVAL, Say, in_notebook

# Characters of the line in a notebook, which has no width of its own.
NOTEBOOK_WIDTH = 128
# The bars of the course of the loss: so many at least once there are enough steps, and twice as many at
# most.
BARS, SPARKS = "▁▂▃▄▅▆▇█", 8


class Course:
    """Keeps the course of a loss in a few numbers, each the mean over the same number of steps."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._span, self._sum, self._count = 1, 0.0, 0

    def add(self, loss: float) -> None:
        """Takes in the loss of one more step. Twice as many steps share a number when there are too many."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < self._span:
            return
        self._means.append(self._sum / self._span)
        self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * SPARKS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._span *= 2

    def drawn(self) -> str:
        """Returns the course as a row of bars, the newest last; "" before there are two."""
        means = self._means[-2 * SPARKS :]
        low, high = min(means, default=0.0), max(means, default=0.0)
        if len(means) < 2:
            return ""
        scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(BARS[round((each - low) * scale)] for each in means)


def can_show(text: str) -> bool:
    """Says whether standard error can write ``text``."""
    try:
        text.encode(sys.stderr.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


class Display:
    """Draws the progress of a run on stderr, and lets other lines pass without tearing it."""

    def __init__(self, steps: int, begin: int, say: Say):
        """Takes the number of ``steps`` of the run and how many are done; ``say`` prints all other lines."""
        self.steps, self.begin, self._say = steps, begin, say
        self._bar: Any = None
        self._course = Course()
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

    def update(self, step: int, text: str, loss: float | None = None) -> None:
        """Shows that ``step`` is done, and ``text`` about it. A log gets a line now and then, and of the last step; a
        terminal and a notebook also show the course of the ``loss``."""
        if loss is not None:
            self._course.add(loss)
        if self._bar is not None:
            drawn = self._course.drawn() if can_show(BARS) else ""
            self._bar.set_postfix_str(f"{drawn} {text}".strip(), refresh=False)
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
