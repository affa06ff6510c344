"""Ends training after the running step, with a checkpoint, on Ctrl-C, a scheduler's SIGTERM, or a closed terminal."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds in which a launcher passes a signal on that its processes have had already, as Ctrl-C in a terminal.
ECHO = 3.0


class StopAfterStep(TrainerCallback):  # type: ignore[misc]
    """Listens for signals while it is entered as a context, and tells the trainer to save and stop as its callback.

    A second signal stops at once. Where several processes train together, all stop after the same step: the trainer
    sets ``requested`` where one of them was ``signalled``.
    """

    def __init__(self, say: Say, alone: bool = True):
        self.say, self.alone = say, alone
        self.signalled = self.requested = False
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopAfterStep:
        # Only the main thread may listen; elsewhere the signals do what they did.
        if threading.current_thread() is threading.main_thread():
            # Under nohup a terminal may close without a word.
            heard = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
            self._before = {each: signal.signal(each, self._handle) for each in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:
            if not self.alone and time.monotonic() - self._when < ECHO:
                return
            raise KeyboardInterrupt
        self.signalled, self._when = True, time.monotonic()
        with contextlib.suppress(RuntimeError):  # in the middle of other output
            self.say("stopping after this step, with a checkpoint (a second time: at once, without one)")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Asks the trainer for a checkpoint and an end if a signal has come."""
        if self.alone:
            self.requested = self.signalled
        if self.requested:
            control.should_save = control.should_training_stop = True
