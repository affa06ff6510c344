"""Keep what a run says in its folder, so that its report can show every choice with its reason."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from qlora_sft.atomic import GrowingFile
from qlora_sft.page.facts import SAID
from qlora_sft.say import Say


class Said:
    """Passes messages on to ``say``, and writes them to ``said.jsonl`` once the run has a folder.

    From then on no run ends because a message cannot be written (the disk is full, the terminal is gone).
    """

    def __init__(self, say: Say):
        self.say = say
        self._waiting: list[str] = []
        self._file: GrowingFile | None = None

    def __call__(self, text: str) -> None:
        line = json.dumps({"text": text}) + "\n"
        if self._file is None:
            self.say(text)
            self._waiting.append(line)
            return
        with suppress(OSError):
            self.say(text)
        self._file.add(line)

    def keep_in(self, run: Path) -> None:
        """Writes all messages so far after those of an earlier part of the run, and from now on every message."""
        self._file = GrowingFile(run / SAID)
        self._file.add("".join(self._waiting))
        self._waiting.clear()
