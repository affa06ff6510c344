"""What a run's training data says about how its model wants to be asked: system text, thinking, tools."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

# Of every source; a hundred thousand rows need not be read again for a text that is always the same.
ROWS = 5000


@dataclass
class Trained:
    """``system``: the one text that every conversation begins with, None if there are several or some have none.
    ``thinks``: whether any row has reasoning or names a thinking mode. ``unknown``: why nothing could be read."""

    system: str | None = None
    thinks: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)
    unknown: str = ""

    @property
    def can_think(self) -> bool:
        """Where nothing is known, the template's modes are left in."""
        return self.thinks or bool(self.unknown)


def read_trained(run: Path) -> Trained:
    """From the first rows of each training source of the run."""
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


def as_ollama_has_it(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as Ollama's types and the Go templates bring it into the prompt: known keys only, properties by name."""
    function = tool.get("function", tool)
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    kept = {name: _only(each, ("type", "description", "enum", "items")) for name, each in sorted(properties.items())}
    whole = {"type": parameters.get("type", ""), "properties": kept, **_only(parameters, ("required",))}
    return {"type": "function", "function": {**_only(function, ("name", "description")), "parameters": whole}}


def _only(content: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: content[key] for key in keys if content.get(key)}
