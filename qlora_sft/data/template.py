"""What the chat template writes, and which characters of it the model has to write itself.

The text is never searched for marker strings. A template with ``{% generation %}`` marks says it; for one without,
a turn is what follows its own generation prompt, provided that both renderings are beginnings of the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_sft.data.shield import any_of, special_tokens
from qlora_sft.data.shipped import suitable
from qlora_sft.data.template_date import today, with_date, writes_date
from qlora_sft.errors import DataError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the rendered text, to be written by the model in message number ``message``."""

    start: int
    end: int
    message: int


@dataclass(frozen=True)
class ChatFormat:
    """How a run writes conversations: the template, why this one, and the tokens at which generation stops."""

    template: str
    reason: str
    stops: frozenset[int]
    day: date | None = None
    """The date that the template writes into every conversation, if it writes today's."""


def has_marks(template: str) -> bool:
    return _MARK.search(template) is not None


def chat_format(
    tokenizer: Any, stops: Iterable[int] = (), name: str | None = None, day: date | None = None
) -> ChatFormat:
    """The format to train with. ``stops``: what the model's generation config stops at, beside the eos token; ``name``:
    the template that is configured in place of the tokenizer's own; ``day``: what a template writes as today's date.

    The template is the tokenizer's own, unless it has no marks and TRL ships a training version of exactly this
    template, which writes the same text for one turn and, unlike some originals, does not rewrite earlier ones.
    Raises `DataError` if there is no template at all.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not isinstance(own, str):
        raise DataError(
            f"the tokenizer has no chat template; name one, e.g. model.chat_template={suitable(tokenizer.get_vocab())}"
        )
    all_stops = frozenset({tokenizer.eos_token_id, *stops})
    called = name or "the tokenizer's own"
    if has_marks(own):
        return _dated(own, f"{called}; its {{% generation %}} marks say what is supervised", all_stops, day)
    trained = _trl_training_template(tokenizer)
    if trained:
        reason = f"TRL's training version of {called}, with {{% generation %}} marks"
        return _dated(trained, reason, all_stops, day)
    return _dated(own, f"{called}; what is supervised follows from its generation prompt", all_stops, day)


def _dated(template: str, reason: str, stops: frozenset[int], day: date | None) -> ChatFormat:
    """The format, with the date held still if the template writes one. Raises `DataError` if it is not valid Jinja."""
    _check_syntax(template)
    if not writes_date(template):
        return ChatFormat(template, reason, stops)
    day = day or today()
    reason += f"; it writes today's date into every conversation: {day}, kept with the run"
    return ChatFormat(with_date(template, day), reason, stops, day)


@lru_cache(maxsize=8)
def _check_syntax(template: str) -> None:
    """Raises `DataError` for a template that cannot be compiled: once, and not for every row."""
    # The marks are transformers' own; blocks of Jinja stand in for them.
    plain = re.sub(r"\bendgeneration\b", "endif", _MARK.sub("{% if true %}", template))
    try:
        jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).from_string(plain)
    except jinja2.TemplateSyntaxError as error:
        raise _no_jinja(error) from None


def _no_jinja(error: jinja2.TemplateSyntaxError) -> DataError:
    return DataError(f"the chat template is not valid Jinja (its line {error.lineno}: {error}); mend it")


def _trl_training_template(tokenizer: Any) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # a template that TRL does not know
        return None
    return template


def render_text(conversation: dict[str, Any], tokenizer: Any, style: ChatFormat) -> tuple[str, list[Span]]:
    """The template's text and one span per assistant message, in order; end-of-turn token included, headers not.

    Raises `DataError` if the spans cannot be derived without guessing.
    """
    messages = conversation["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if has_marks(style.template):
        text, bounds = apply(conversation, tokenizer, style.template, marks=True)
        if len(bounds) > len(turns):
            # Phi-3's marks another eos after the last turn, long after generation has stopped.
            only_control = any_of(special_tokens(tokenizer))
            bounds = [(start, end) for start, end in bounds if only_control.sub("", text[start:end]).strip()]
        if len(bounds) != len(turns):
            raise DataError(f"the chat template marks {len(bounds)} generated parts for {len(turns)} assistant turns")
    else:
        text, _ = apply(conversation, tokenizer, style.template)
        bounds = [_by_prefix(conversation, turn, text, tokenizer, style.template) for turn in turns]
    spans = [Span(start, end, turn) for (start, end), turn in zip(bounds, turns, strict=True)]
    return text, [_exact(span, text, conversation, tokenizer, style) for span in spans]


def apply(
    conversation: dict[str, Any], tokenizer: Any, template: str, *, marks: bool = False, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """(text, bounds of what stands between marks); ``prompt``: with the generation prompt at the end."""
    try:
        texts, bounds = render_jinja_template(
            [[_with_aliases(message) for message in conversation["messages"]]],
            tools=conversation.get("tools") or None,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
            **(conversation.get("chat_template_kwargs") or {}),
        )
    except jinja2.TemplateSyntaxError as error:
        raise _no_jinja(error) from None
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # Expressions of a template fail as Python's do: a split without the part that is taken, a field that is None.
        raise DataError(
            f"the chat template fails on this conversation ({type(error).__name__}: {error}); it expects something "
            "that the row has not: change the row, or use another model.chat_template"
        ) from None
    return texts[0], bounds[0] if marks else []


def _with_aliases(message: dict[str, Any]) -> dict[str, Any]:
    """Families call the reasoning by different names; a template reads the one it knows."""
    if not message.get("reasoning"):
        return message
    return {**message, "reasoning_content": message["reasoning"], "thinking": message["reasoning"]}


def _by_prefix(conversation: dict[str, Any], turn: int, text: str, tokenizer: Any, template: str) -> tuple[int, int]:
    """What the turn adds to its generation prompt. A template that rewrites history breaks the premise."""
    messages = conversation["messages"]
    prompt, _ = apply({**conversation, "messages": messages[:turn]}, tokenizer, template, prompt=True)
    until, _ = apply({**conversation, "messages": messages[: turn + 1]}, tokenizer, template)
    if not (text.startswith(prompt) and text.startswith(until) and until.startswith(prompt)):
        raise DataError(
            f"message {turn}: the chat template writes this turn differently when more turns follow or when it is "
            "prompted for, so its text cannot be told apart with certainty. Use a template with {% generation %} "
            f"marks: model.chat_template={suitable(tokenizer.get_vocab())}, another shipped one, or a .jinja file of "
            "your own"
        )
    return len(prompt), len(until)


def _exact(span: Span, text: str, conversation: dict[str, Any], tokenizer: Any, style: ChatFormat) -> Span:
    """The span without what the template adds (a header, an empty think block, what follows the end of turn), and with
    the end of turn where the marks stop right before it: the model has to write it, whatever they say. Where there is
    none at all the renderer raises."""
    start, end = _start(span, text, conversation, tokenizer, style.template), span.end
    # Gemma's <end_of_turn> is no special token, but it is where generation stops.
    stops = tuple(tokenizer.convert_ids_to_tokens(sorted(style.stops)))
    ends = [match.end() for match in any_of((*special_tokens(tokenizer), *stops)).finditer(text, start, end)]
    if ends and not text[ends[-1] : end].strip():
        end = ends[-1]
    if not text.endswith(stops, start, end):
        behind = any_of(stops).match(text, end)
        end = behind.end() if behind else end
    return Span(start, end, span.message)


def _start(span: Span, text: str, conversation: dict[str, Any], tokenizer: Any, template: str) -> int:
    """Where the model begins to write. Some marks take in the header, or a part of it: Qwen2.5's its newline."""
    message = conversation["messages"][span.message]
    content = message.get("content") or ""
    if content[:1].strip() and text.startswith(content, span.start):
        return span.start
    start = span.start if message.get("reasoning") else _behind_empty_thinking(text, span.start, span.end)
    if start > span.start:
        return start
    # A turn that begins with anything but its content may rightly do so; the prompt decides.
    before = {**conversation, "messages": conversation["messages"][: span.message]}
    prompt, _ = apply(before, tokenizer, template, prompt=True)
    if text.startswith(prompt) and start <= len(prompt) <= span.end:
        start = len(prompt)
    return start if message.get("reasoning") else _behind_empty_thinking(text, start, span.end)


def _behind_empty_thinking(text: str, start: int, end: int) -> int:
    empty = _EMPTY_THINKING.match(text, start, end)
    return empty.end() if empty else start


def check_nothing_lost(conversation: dict[str, Any], text: str, spans: list[Span]) -> None:
    """Every message's text is in the rendering, and every assistant turn's in its own span; else `DataError`.

    A template that knows no tools or no reasoning leaves them out without a word, and the model would learn to
    answer without them.
    """
    of_message = {span.message: text[span.start : span.end] for span in spans}
    silent = (conversation.get("chat_template_kwargs") or {}).get("enable_thinking") is False
    for index, message in enumerate(conversation["messages"]):
        where = of_message.get(index, text)
        wanted = [("content", message.get("content") or "")]
        if message.get("reasoning") and not silent:
            wanted.append(("reasoning", message["reasoning"]))
        wanted += [("tool_calls", call.get("function", call)["name"]) for call in message.get("tool_calls") or []]
        for key, value in wanted:
            # Some templates write a tool's result as a JSON text.
            if value.strip() not in where and json.dumps(value.strip(), ensure_ascii=False)[1:-1] not in where:
                raise DataError(
                    f"message {index} ({message['role']}): the chat template leaves out its {key!r}; use one that "
                    "knows it, e.g. model.chat_template=chatml-think"
                )
    for tool in conversation.get("tools") or []:
        name = tool.get("function", tool).get("name", "")
        if name not in text:
            raise DataError(f"the chat template leaves out the tool {name!r}; use model.chat_template=chatml-think")
