"""Keep what a run says in its folder, so that its report can show every choice with its reason."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from qlora_sft.page.facts import SAID
from qlora_sft.say import Say


class Said:
    """Passes texts on to ``say``, and writes them to ``said.jsonl`` from the moment on when the run has a folder.

    That they cannot be written ends no run: the disk may be full, and what it says is then still on the terminal.
    """

    def __init__(self, say: Say):
        self.say = say
        self._waiting: list[str] = []
        self._file: Path | None = None

    def __call__(self, text: str) -> None:
        self.say(text)
        self._waiting.append(text)
        if self._file is not None:
            self._write(self._file)

    def keep_in(self, run: Path) -> None:
        """Writes what was said so far behind what an earlier part of the run has said, and from now on every text."""
        self._file = run / SAID
        self._write(self._file)

    def _write(self, file: Path) -> None:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in self._waiting)
        with suppress(OSError), file.open("a", encoding="utf-8") as opened:
            opened.write(lines)
        self._waiting.clear()
