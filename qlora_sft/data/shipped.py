"""Describe the shipped templates: the control tokens that each of them writes, and those that tell its family."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from qlora_sft.errors import ConfigError
from qlora_sft.text import as_path, read_text

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Shipped:
    """Describes one shipped template."""

    known_by: tuple[str, ...]
    """Tokens that a base of the family has in its vocabulary."""
    control: tuple[str, ...]
    """Structure that the template writes, one token each, without tags that a model can spell (<think>)."""
    end: str
    """The token that ends a turn; empty if that is the base's own eos token."""


_CHATML = ("<|im_start|>", "<|im_end|>")
_MISTRAL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
# The more particular family first.
SHIPPED = {
    "qwen3": Shipped(("<|im_start|>", "<think>"), _CHATML, "<|im_end|>"),
    "chatml-think": Shipped(("<|im_start|>",), _CHATML, "<|im_end|>"),
    "llama3": Shipped(
        ("<|start_header_id|>",), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "gemma": Shipped(("<start_of_turn>",), ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": Shipped(("[INST]", "[AVAILABLE_TOOLS]"), (*_MISTRAL, "[/TOOL_RESULTS]"), ""),
    "phi": Shipped(("<|assistant|>", "<|end|>"), ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "chatml": Shipped(("<|im_start|>",), _CHATML, "<|im_end|>"),
}


def suitable(vocabulary: Container[str]) -> str:
    """Returns the shipped template for the family of the vocabulary; ChatML, which every
    base can learn, if there is none."""
    return next((name for name, each in SHIPPED.items() if all(t in vocabulary for t in each.known_by)), "chatml-think")


def template_text(name: str) -> str:
    """Returns the text of a shipped template, or of the file of that name. Raises `ConfigError` if it is neither."""
    file = FOLDER / f"{name}.jinja" if name in SHIPPED else as_path(name)
    if not file.is_file():
        names = ", ".join(sorted(SHIPPED))
        raise ConfigError(f"model.chat_template: {name}: neither a file nor a shipped template ({names})")
    return read_text(file)
