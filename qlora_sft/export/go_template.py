"""The Go form, which Ollama needs, of the chat template a model was trained with.

Known for the shipped templates. Whether a tokenizer's template is one of them is decided by what it writes, not by its
name: both have to render every probe alike, or refuse it alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jinja2

FOLDER = Path(__file__).parent / "go_templates"
JINJA = Path(__file__).parent.parent / "data" / "templates"
# Shipped template -> (its Go form, the parts that form uses). Ollama asks every model that can think to think, unless
# told otherwise, so a model that never learned the modes of chatml-think must not look as if it had them.
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

_QUESTION = {"role": "user", "content": " What is <b> & 'c'?\n"}
_ANSWER = {"role": "assistant", "content": "It is d."}
_SYSTEM = {"role": "system", "content": "Be brief."}
_THOUGHT = {"role": "assistant", "content": "It is d.", "reasoning": "As a is b."}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"days": 3, "place": "Zürich"}}}],
}
_TWO_CALLS = {**_CALL, "content": "Let me look.", "tool_calls": [*_CALL["tool_calls"], *_CALL["tool_calls"]]}
_RESULT = {"role": "tool", "content": '{"sky": "grey"}'}
_PARAMETERS = {
    "type": "object",
    "properties": {"days": {"type": "integer", "description": "How many"}, "place": {"type": "string"}},
    "required": ["place"],
}
_TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Looks it up", "parameters": _PARAMETERS}},
]
# Conversations that take a template apart: turns, system text, tools, calls, results, thinking.
PROBES: list[dict[str, Any]] = [
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
    """``name`` of the shipped template, and the ``text`` of its Go form."""

    name: str
    text: str


def go_template(tokenizer: Any, adds_bos: bool, thinks: bool) -> GoTemplate | None:
    """The Go form of ``tokenizer``'s template, or None if it is none of the shipped ones.

    ``adds_bos``: whether the runtime puts the bos token before every prompt; then the template must not.
    ``thinks``: whether the model was trained on the template's thinking modes.
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


def shipped_name(tokenizer: Any) -> str | None:
    """Which shipped template writes what the tokenizer's own writes, for every probe."""
    own = tokenizer.chat_template
    if not isinstance(own, str):
        return None
    wanted = [rendered(probe, tokenizer, own) for probe in PROBES]
    for name in FORMS:
        shipped = (JINJA / f"{name}.jinja").read_text(encoding="utf-8")
        # Lazily: most differ in the first probe.
        if all(text == rendered(probe, tokenizer, shipped) for text, probe in zip(wanted, PROBES, strict=True)):
            return name
    return None


def writes_bos(tokenizer: Any) -> bool:
    """Whether the template itself puts the bos token at the beginning.

    Asked with another text for bos: SmolLM2's is ``<|im_start|>``, with which ChatML begins of its own accord.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {**tokenizer.special_tokens_map, "bos_token": "<bos of writes_bos>"}
    try:
        texts, _ = render_jinja_template([PROBES[0]["messages"]], chat_template=tokenizer.chat_template, **tokens)
    except (jinja2.TemplateError, TypeError):
        return False
    return bool(tokenizer.bos_token) and str(texts[0]).startswith(tokens["bos_token"])


def rendered(conversation: dict[str, Any], tokenizer: Any, template: str) -> str | None:
    """The prompt, or None if the template refuses this conversation."""
    from qlora_sft.data.conversation import Conversation
    from qlora_sft.data.template import apply
    from qlora_sft.errors import DataError

    try:
        return apply(cast(Conversation, conversation), tokenizer, template, prompt=True)[0]
    except DataError:
        return None


def _read(name: str) -> str:
    return (FOLDER / f"{name}.gotmpl").read_text(encoding="utf-8")
