"""Keeps answers on disk as they are generated, one line per answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qlora_sft.atomic import disk_error


@dataclass(frozen=True)
class Generated:
    """Holds one generated answer."""

    ids: list[int]
    """The new tokens, without the stop token."""
    ended: bool
    """Whether there was a stop token."""
    entropy: float = field(default=0.0, compare=False)
    """The mean entropy of the distributions that its tokens were taken from, in nats. The same answer in another batch
    has one that differs in rounding."""


@dataclass(frozen=True)
class KeptAnswers:
    """Holds the file of one task's answers, by the number of the prompt."""

    file: Path

    def read(self) -> dict[int, Generated]:
        """Returns the answers. A last line that was cut off by what ended the process is left out."""
        known: dict[int, Generated] = {}
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    answer = Generated(list(map(int, row["ids"])), bool(row["ended"]), float(row["entropy"]))
                    known[int(row["prompt"])] = answer
        return known

    def add(self, prompts: Sequence[int], answers: Sequence[Generated]) -> None:
        """Writes the answers of one batch behind the others. Raises `RunError` if the disk is full."""
        rows = [json.dumps({"prompt": number, **asdict(each)}) for number, each in zip(prompts, answers, strict=True)]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                # What was cut off before would swallow the first row.
                file.write("\n" + "\n".join(rows) + "\n")
        except OSError as error:
            raise disk_error(error, self.file) or error from None
