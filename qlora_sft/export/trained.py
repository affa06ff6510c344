"""Reads from a run's training data how its model has to be prompted: system text, thinking, tools."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_sft.json_types import JsonObject

# The most rows that are read of a source, because a text that is always the same shows in few rows.
ROWS = 5000


@dataclass
class Trained:
    """Holds what the training data shows."""

    system: str | None = None
    """The text with which every conversation begins, or None if there are several or if some have none."""
    thinks: bool = False
    """Whether any row has reasoning or names a thinking mode."""
    tools: list[JsonObject] = field(default_factory=list)
    unknown: str = ""
    """Why nothing could be read."""

    @property
    def can_think(self) -> bool:
        """Says whether the template keeps its thinking modes. It does where nothing is known."""
        return self.thinks or bool(self.unknown)


def read_trained(run: Path) -> Trained:
    """Reads the first rows of each training source of the run."""
    from qlora_sft.config import load_config
    from qlora_sft.data.sources import read_sources
    from qlora_sft.errors import QloraSftError, first_line

    found, systems, tools = Trained(), set(), {}
    try:
        config = load_config(run / "config.yaml")
        for source in read_sources(config.data.train, config.seed):
            found.thinks |= source.settings.thinking != "auto"
            for row in islice(iter(source.rows), ROWS):
                if "messages" not in row:
                    continue  # a plain text is nobody's answer
                first = row["messages"][0]
                systems.add(first.get("content") if first.get("role") == "system" else None)
                found.thinks |= "enable_thinking" in (row.get("chat_template_kwargs") or {})
                found.thinks |= any(message.get("reasoning") for message in row["messages"])
                tools.update({json.dumps(tool): tool for tool in row.get("tools") or []})
    except (QloraSftError, OSError) as error:
        return Trained(unknown=f"the training data cannot be read: {first_line(error)}")
    if len(systems) == 1:
        found.system = systems.pop()
    found.tools = list(tools.values())
    return found


def function_of(tool: JsonObject) -> JsonObject:
    """Returns the description of a tool's function, which may stand in the tool itself."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def as_ollama_has_it(tool: dict[str, Any]) -> JsonObject:
    """Returns a tool as Ollama and the Go templates write it: with known keys only, and properties in order of name."""
    function = tool.get("function", tool)
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    kept = {name: _only(each, ("type", "description", "enum", "items")) for name, each in sorted(properties.items())}
    whole = {"type": parameters.get("type", ""), "properties": kept, **_only(parameters, ("required",))}
    return {"type": "function", "function": {**_only(function, ("name", "description")), "parameters": whole}}


def _only(content: JsonObject, keys: tuple[str, ...]) -> JsonObject:
    """Returns the entries of ``content`` under ``keys`` that hold something."""
    return {key: content[key] for key in keys if content.get(key)}
