"""Finds the Go form, which Ollama needs, of the chat template with which a model was trained.

Only the shipped templates have a Go form. A tokenizer's template is recognised as one of them by what it writes, not
by its name: both have to render every probe alike, or refuse it alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_sft.data.conversation import Conversation, Message
    from qlora_sft.json_types import JsonObject

FOLDER = Path(__file__).parent / "go_templates"
JINJA = Path(__file__).parent.parent / "data" / "templates"
# By shipped template, its Go form and the parts that the form uses. Ollama makes every model think whose template can,
# unless it is told otherwise. So a model that never learned the modes of chatml-think must not look as if it had them.
FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": ("chatml", ()),
    "chatml-think": ("chatml-think", ("_json",)),
    "gemma": ("gemma", ("_trim",)),
    "llama3": ("llama3", ("_json", "_trim")),
    "mistral": ("mistral", ("_json",)),
    "phi": ("phi", ()),
    "qwen3": ("qwen3", ("_json", "_strip")),
}
WITHOUT_THINKING = {"chatml-think": "chatml-tools"}

_QUESTION: Message = {"role": "user", "content": " What is <b> & 'c'?\n"}
_ANSWER: Message = {"role": "assistant", "content": "It is d."}
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_THOUGHT: Message = {"role": "assistant", "content": "It is d.", "reasoning": "As a is b."}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"days": 3, "place": "Zürich"}}}],
}
_TWO_CALLS: Message = {**_CALL, "content": "Let me look.", "tool_calls": [*_CALL["tool_calls"], *_CALL["tool_calls"]]}
_RESULT: Message = {"role": "tool", "content": '{"sky": "grey"}'}
_PARAMETERS: JsonObject = {
    "type": "object",
    "properties": {"days": {"type": "integer", "description": "How many"}, "place": {"type": "string"}},
    "required": ["place"],
}
_TOOLS: list[JsonObject] = [
    {"type": "function", "function": {"name": "look", "description": "Looks it up", "parameters": _PARAMETERS}},
]
# These conversations use every part of a template: turns, system text, tools, calls, results, thinking.
PROBES: list[Conversation] = [
    {"messages": [_QUESTION]},
    {"messages": [_QUESTION, _ANSWER, _QUESTION]},
    {"messages": [_SYSTEM, _QUESTION, _ANSWER, _QUESTION]},
    {"messages": [_QUESTION], "tools": _TOOLS},
    {"messages": [_SYSTEM, _QUESTION, _CALL, _RESULT], "tools": _TOOLS},
    {"messages": [_QUESTION, _CALL, _RESULT, _ANSWER, _QUESTION], "tools": _TOOLS},
    {"messages": [_QUESTION, _TWO_CALLS, _RESULT, _RESULT, _ANSWER, _QUESTION], "tools": _TOOLS},
    {"messages": [_QUESTION, _THOUGHT, _QUESTION]},
    {"messages": [_QUESTION, _ANSWER, _QUESTION], "chat_template_kwargs": {"enable_thinking": True}},
    {"messages": [_SYSTEM, _QUESTION, _THOUGHT, _QUESTION], "chat_template_kwargs": {"enable_thinking": False}},
]


@dataclass(frozen=True)
class GoTemplate:
    """Holds the name of a shipped template and the text of its Go form."""

    name: str
    text: str


def go_template(tokenizer: PreTrainedTokenizerBase, adds_bos: bool, thinks: bool) -> GoTemplate | None:
    """Returns the Go form of the tokenizer's template, or None if that is not one of the shipped ones.

    adds_bos: whether the runtime puts the bos token before every prompt; then the template must not.
    thinks: whether the model was trained on the template's thinking modes.
    """
    name = shipped_name(tokenizer)
    if name is None:
        return None
    main, parts = FORMS[name]
    if not thinks:
        main = WITHOUT_THINKING.get(name, main)
    text = "".join(_read(part) for part in parts) + _read(main).rstrip("\n")
    if name == "mistral":
        text = text.replace("</s>", tokenizer.eos_token)
    return GoTemplate(name, (tokenizer.bos_token if writes_bos(tokenizer) and not adds_bos else "") + text)


def shipped_name(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Names the shipped template that renders every probe as the tokenizer's own does, or returns None."""
    own = tokenizer.chat_template
    if not isinstance(own, str):
        return None
    wanted = [rendered(probe, tokenizer, own) for probe in PROBES]
    for name in FORMS:
        shipped = (JINJA / f"{name}.jinja").read_text(encoding="utf-8")
        # Most templates differ in the first probe already, so the others are rendered only when they are needed.
        if all(text == rendered(probe, tokenizer, shipped) for text, probe in zip(wanted, PROBES, strict=True)):
            return name
    return None


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Says whether the template itself puts the bos token at the beginning.

    The template is rendered with another text for bos, because SmolLM2's bos token is ``<|im_start|>``, with which
    ChatML begins anyway.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {**tokenizer.special_tokens_map, "bos_token": "<bos of writes_bos>"}
    try:
        texts, _ = render_jinja_template([PROBES[0]["messages"]], chat_template=tokenizer.chat_template, **tokens)
    except (jinja2.TemplateError, TypeError):
        return False
    return bool(tokenizer.bos_token) and str(texts[0]).startswith(tokens["bos_token"])


def rendered(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """Renders the prompt of a conversation, or returns None if the template refuses it."""
    from qlora_sft.data.template import apply
    from qlora_sft.errors import DataError

    try:
        return apply(conversation, tokenizer, template, prompt=True)[0]
    except DataError:
        return None


def _read(name: str) -> str:
    """Reads one part of a Go template."""
    return (FOLDER / f"{name}.gotmpl").read_text(encoding="utf-8")
