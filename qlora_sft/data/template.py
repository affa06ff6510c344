"""Render a chat template and find the characters that the model has to write itself.

The text is never searched for marker strings. A template with ``{% generation %}`` marks says which characters they
are. Without marks, a turn is what follows its own generation prompt, provided that both renderings are beginnings of
the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING

import jinja2
import jinja2.ext
import jinja2.meta
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_sft.data.complete import check_nothing_lost
from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.data.opening import PromptBefore, header_end, opened_twice, prompt_gap, turn_start
from qlora_sft.data.reasoning import KEYS, with_inline_reasoning
from qlora_sft.data.shield import any_of, special_tokens
from qlora_sft.data.shipped import suitable
from qlora_sft.data.template_date import today, with_date, writes_date
from qlora_sft.data.typed_parts import as_template_reads, check_no_lists
from qlora_sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Expressions of a template fail as Python's do: a split without the part that is taken, a field that is None.
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Span:
    """Marks characters [start, end) of the rendered text, which the model writes in message number ``message``."""

    start: int
    end: int
    message: int


@dataclass(frozen=True)
class ChatFormat:
    """Says how a run writes conversations: the template, why this one, and the tokens at which generation stops."""

    template: str
    reason: str
    stop_token_ids: frozenset[int]
    day: date | None = None
    """The date that the template writes into every conversation, if it writes today's."""
    original: str | None = None
    """The template by which a runtime prompts, if ``template`` is a training version of it."""


def as_prompted(chat_format: ChatFormat) -> ChatFormat:
    """Returns the format with the template by which a runtime prompts, which may rewrite earlier turns."""
    return replace(chat_format, template=chat_format.original or chat_format.template, original=None)


def has_marks(template: str) -> bool:
    return _MARK.search(template) is not None


def choose_chat_format(
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Iterable[int] = (),
    name: str | None = None,
    day: date | None = None,
) -> ChatFormat:
    """Returns the format to train with.

    stop_token_ids: tokens at which the model's generation config stops, beside the eos token.

    name: the template that is configured in place of the tokenizer's own.

    day: what a template writes as today's date.

    The template is the tokenizer's own, unless it has no marks and TRL ships a training version of exactly this
    template. That version writes the same text for one turn and, unlike some originals, does not rewrite earlier ones.
    Raises `DataError` if there is no template at all.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not isinstance(own, str):
        raise DataError(
            f"the tokenizer has no chat template; name one, e.g. model.chat_template={suitable(tokenizer.get_vocab())}"
        )
    all_stops = frozenset({tokenizer.eos_token_id, *stop_token_ids})
    called = name or "the tokenizer's own"
    if has_marks(own):
        return _dated(own, f"{called}; its {{% generation %}} marks say what is supervised", all_stops, day)
    trained = _trl_training_template(tokenizer)
    if trained:
        reason = f"TRL's training version of {called}, with {{% generation %}} marks"
        chosen = _dated(trained, reason, all_stops, day)
        return replace(chosen, original=_dated(own, reason, all_stops, chosen.day or day).template)
    return _dated(own, f"{called}; what is supervised follows from its generation prompt", all_stops, day)


def _dated(template: str, reason: str, stop_token_ids: frozenset[int], day: date | None) -> ChatFormat:
    """Returns the format, with the date fixed if the template writes one. Raises
    `DataError` if it is not valid Jinja."""
    _check_syntax(template)
    if not writes_date(template):
        return ChatFormat(template, reason, stop_token_ids)
    day = day or today()
    reason += f"; it writes today's date into every conversation: {day}, kept with the run"
    return ChatFormat(with_date(template, day), reason, stop_token_ids, day)


@lru_cache(maxsize=8)
def _check_syntax(template: str) -> None:
    """Raises `DataError` for a template that cannot be compiled, once and not for every row."""
    # The marks are transformers' own; blocks of Jinja stand in for them.
    plain = re.sub(r"\bendgeneration\b", "endif", _MARK.sub("{% if true %}", template))
    try:
        jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).from_string(plain)
    except jinja2.TemplateSyntaxError as error:
        raise _no_jinja(error) from None


def _no_jinja(error: jinja2.TemplateSyntaxError) -> DataError:
    return DataError(f"the chat template is not valid Jinja (its line {error.lineno}: {error}); mend it")


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """Returns the variables that the template reads beside its own."""
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    parsed = jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).parse(plain)
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))


def _trl_training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        template: str | None = get_training_chat_template(tokenizer)
    except (*FAILURES, jinja2.TemplateError):  # a template that TRL does not know, or that fails on what TRL tries
        return None
    return template


def render_whole(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> tuple[Conversation, str, list[Span]]:
    """Returns the conversation as it was rendered, its text and its spans, with nothing left out.

    If a template knows ``<think>`` but no key for the reasoning (DeepSeek-R1-Distill's), the reasoning is put into the
    content. Raises `DataError`.
    """
    try:
        return conversation, *_checked(conversation, tokenizer, chat_format)
    except DataError:
        inline = with_inline_reasoning(conversation, chat_format.template)
        if inline is conversation:
            raise
        try:
            text, spans = _checked(inline, tokenizer, chat_format)
            if any(opened_twice(text, span.start) for span in spans):
                inline = with_inline_reasoning(conversation, chat_format.template, opened=True)
                text, spans = _checked(inline, tokenizer, chat_format)
            return inline, text, spans
        except DataError:
            pass  # the first fault is that of the row as it was written
        raise


def _checked(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> tuple[str, list[Span]]:
    text, spans = render_text(conversation, tokenizer, chat_format)
    check_nothing_lost(conversation, text, spans)
    return text, spans


def _of_calls_alone(turns: list[Message]) -> str:
    """Says what to do where turns that are tool calls and nothing else may be why a template writes too few of them."""
    if not any(turn.get("tool_calls") and not turn.get("content") for turn in turns):
        return ""
    return "; it may write no turn of tool calls alone: use one that knows them, e.g. model.chat_template=chatml-think"


def render_text(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> tuple[str, list[Span]]:
    """Returns the template's text and one span per assistant message, in order.

    A span includes the end-of-turn token, but no header. Messages that are ``past`` (see `unroll`) may have none.
    Raises `DataError` if the spans cannot be derived without guessing.
    """
    messages = conversation["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if has_marks(chat_format.template):
        text, bounds = apply(conversation, tokenizer, chat_format.template, marks=True)
        if len(bounds) > len(turns):
            # Phi-3's marks another eos after the last turn, long after generation has stopped.
            only_control = any_of(special_tokens(tokenizer))
            bounds = [(start, end) for start, end in bounds if only_control.sub("", text[start:end]).strip()]
        if len(bounds) != len(turns):
            raise DataError(
                f"the chat template marks {len(bounds)} generated parts for {len(turns)} assistant turns"
                f"{_of_calls_alone([messages[turn] for turn in turns])}"
            )
    else:
        text, _ = apply(conversation, tokenizer, chat_format.template)
        turns = [turn for turn in turns if not messages[turn].get("past")]
        bounds = [_by_prefix(conversation, turn, text, tokenizer, chat_format.template) for turn in turns]
    spans = [Span(start, end, turn) for (start, end), turn in zip(bounds, turns, strict=True)]
    exact = [_exact(span, text, conversation, tokenizer, chat_format) for span in spans]
    if any(message.get("past") for message in messages):
        return _as_prompted(text, exact[-1], conversation, tokenizer, chat_format)
    return text, exact


def _as_prompted(
    text: str, span: Span, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> tuple[str, list[Span]]:
    """Returns the last turn behind its own prompt.

    In a finished conversation gpt-oss' template leaves out the reasoning before a tool call, which it shows the model
    while there is no answer yet.
    """
    before = prompt_before(conversation, span.message, tokenizer, chat_format.template)
    prompt, without = before(True), before(False)
    header = prompt[len(without) :] if prompt.startswith(without) else ""
    if text.startswith(prompt) or not header or not text.endswith(header, 0, span.start):
        return text, [span]
    end = len(prompt) + span.end - span.start
    return prompt + text[span.start :], [Span(len(prompt), end, span.message)]


def apply(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    marks: bool = False,
    prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the rendered text, and the bounds of what stands between marks if ``marks`` is true.

    prompt: adds the generation prompt at the end. Raises `DataError` if the template refuses the conversation.
    """
    messages = as_template_reads([_with_aliases(message) for message in conversation["messages"]], template)
    try:
        texts, bounds = render_jinja_template(
            [messages],
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
    except FAILURES as error:
        raise DataError(
            f"the chat template fails on this conversation ({type(error).__name__}: {error}); it expects something "
            "that the row has not: change the row, or use another model.chat_template"
        ) from None
    check_no_lists(messages, texts[0])
    return texts[0], bounds[0] if marks else []


def _with_aliases(message: Message) -> Mapping[str, object]:
    """Returns the message with its reasoning under all names that families use; a template reads the one it knows."""
    if not message.get("reasoning"):
        return message
    return {**message, **dict.fromkeys(KEYS, message["reasoning"])}


def _by_prefix(
    conversation: Conversation, turn: int, text: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[int, int]:
    """Returns the bounds of what the turn adds to its generation prompt, or to the header in which that begins.

    Raises `DataError` for a template that rewrites history, which breaks the premise.
    """
    messages = conversation["messages"]
    prompt, _ = apply({**conversation, "messages": messages[:turn]}, tokenizer, template, prompt=True)
    until, _ = apply({**conversation, "messages": messages[: turn + 1]}, tokenizer, template)
    if text.startswith(until) and until.startswith(prompt):
        return len(prompt), len(until)
    before = prompt_before(conversation, turn, tokenizer, template)
    if text.startswith(until) and not messages[turn].get("reasoning"):

        def with_answer(answer: str) -> str:
            probe: Message = {"role": "assistant", "content": answer}
            asked: Conversation = {**conversation, "messages": [*messages[:turn], probe]}
            return apply(asked, tokenizer, template)[0]

        start = header_end(until, before, with_answer)
        if start:
            return start, len(until)
    why = "differently when more turns follow or when it is prompted for"
    if before(True) == before(False):
        why = "before a generation prompt that it puts behind every conversation, whether asked for one or not"
    raise DataError(
        f"message {turn}: the chat template writes this turn {why}, so its text cannot be told apart with certainty. "
        "Use a template with {% generation %} "
        f"marks: model.chat_template={suitable(tokenizer.get_vocab())}, another shipped one, or a .jinja file of "
        "your own"
    )


def _exact(
    span: Span, text: str, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> Span:
    """Returns the span of exactly what the model has to write.

    What the template adds is taken out: a header, an empty think block, what follows the end of turn. The end of turn
    is taken in where the marks stop right before it, because the model has to write it. If there is none at all, the
    renderer raises.
    """
    message = conversation["messages"][span.message]
    before = prompt_before(conversation, span.message, tokenizer, chat_format.template)
    start, end = turn_start(text, span.start, span.end, message, before), span.end
    # Gemma's <end_of_turn> is no special token, but it is where generation stop_token_ids.
    stop_token_ids = tuple(tokenizer.convert_ids_to_tokens(sorted(chat_format.stop_token_ids)))
    ends = [match.end() for match in any_of((*special_tokens(tokenizer), *stop_token_ids)).finditer(text, start, end)]
    if ends and not text[ends[-1] : end].strip():
        end = ends[-1]
    if not text.endswith(stop_token_ids, start, end):
        behind = any_of(stop_token_ids).match(text, end)
        end = behind.end() if behind else end
    return Span(start, end, span.message)


def prompt_before(
    conversation: Conversation, turn: int, tokenizer: PreTrainedTokenizerBase, template: str
) -> PromptBefore:
    earlier: Conversation = {**conversation, "messages": conversation["messages"][:turn]}
    return lambda prompt: apply(earlier, tokenizer, template, prompt=prompt)[0]


def gap_before(
    span: Span, text: str, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> str:
    """Returns the end of a turn's generation prompt that its training text lacks, tried once for turns of one shape."""
    messages, turn = conversation["messages"], span.message
    message = messages[turn]
    shape = (
        repr(tokenizer.special_tokens_map),
        repr(conversation.get("chat_template_kwargs")),
        bool(conversation.get("tools")),
        [each["role"] for each in messages[max(0, turn - 1) : turn]] == ["tool"],
        any(each["role"] == "tool" for each in messages[:turn]),
        bool(message.get("reasoning")),
        bool(message.get("tool_calls")),
        (message.get("content") or "").startswith("<think>"),
    )
    known = _gaps(chat_format.template)
    if shape not in known:
        try:
            known[shape] = prompt_gap(
                text, span.start, prompt_before(conversation, turn, tokenizer, chat_format.template)
            )
        except DataError:  # some templates refuse a conversation that nobody has begun
            known[shape] = ""
    return known[shape]


@lru_cache(maxsize=8)
def _gaps(template: str) -> dict[tuple[object, ...], str]:
    """Returns the map from the shape of a turn to its gap, which is filled as shapes come."""
    return {}
