"""Define what answers in a chat, as the terminal sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject
from qlora_sft.run.folder import is_run

Messages = list[JsonObject]


@dataclass(frozen=True)
class Said:
    """Holds an answer as the model wrote it, and why it ended: "stop" (the model stopped), "length" or "interrupt"."""

    text: str
    ended: str = "stop"


class Speaker(Protocol):
    """Answers ``messages`` under the model's template.

    ``show`` gets every piece as it comes. ``stopped`` is asked repeatedly whether to give up. Raises `ContextFull`.
    """

    def __call__(
        self, messages: Messages, think: bool | None, show: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Said: ...


def check_model(path: Path) -> None:
    """Raises `ConfigError` for a path that nobody can talk to."""
    if path.suffix != ".gguf" and not is_run(path) and not (path / "config.json").is_file():
        raise ConfigError(f"{path}: neither a run folder, nor a model folder, nor a .gguf file")
