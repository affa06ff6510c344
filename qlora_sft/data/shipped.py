"""The shipped templates: the control tokens that each of them writes, and by which a base of its family is known."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from qlora_sft.errors import ConfigError
from qlora_sft.text import as_path, read_text

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Shipped:
    """``control``: what the template writes as structure and must be one token each. Tags that a model can spell, like
    <think>, are not among it. ``end``: the one that ends a turn; empty where that is the base's own eos token."""

    known_by: tuple[str, ...]
    control: tuple[str, ...]
    end: str


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
    """The shipped template whose family the vocabulary is of; ChatML, which every base can learn, if none."""
    return next((name for name, each in SHIPPED.items() if all(t in vocabulary for t in each.known_by)), "chatml-think")


def template_text(name: str) -> str:
    """A shipped template by its name, or what is in the file of that name. Raises `ConfigError` if it is neither."""
    file = FOLDER / f"{name}.jinja" if name in SHIPPED else as_path(name)
    if not file.is_file():
        names = ", ".join(sorted(SHIPPED))
        raise ConfigError(f"model.chat_template: {name}: neither a file nor a shipped template ({names})")
    return read_text(file)
