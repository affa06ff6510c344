"""Rows in any of the usual forms -> conversations, and how a form is recognised.

- ``messages``: ``{messages: [{role, content, ...}], tools?, system?, chat_template_kwargs?}``
- ``sharegpt``: ``{conversations: [{from, value}], tools?, system?}``
- ``alpaca``: ``{instruction, output, input?, history?, system?}``
- ``prompt_completion``: ``{prompt, completion, ...}``, texts or lists of messages; also question/answer
- ``text``: ``{text}``, every token supervised: continued pre-training and replay
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_sft.config_data import FORMS
from qlora_sft.data.messages import Message, from_json_text, kind, read_message, read_tools
from qlora_sft.errors import DataError

Conversation = dict[str, Any]
"""``messages``: list of {role, content, reasoning?, tool_calls?, name?, tool_call_id?, train?, weight?}; ``tools``?;
``chat_template_kwargs``?; or else ``text``; and ``file`` and ``line``: where it stood (the row's number in files
without lines)."""

# Column names that leave no doubt about which is the question and which the answer.
_PAIRS = (("prompt", "response"), ("question", "answer"), ("query", "response"), ("problem", "solution"))
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
    **{"system": "system", "function_call": "function_call", "tool_call": "function_call"},
}
_SHAREGPT_KEYS = {"from", "value", "weight", "loss_weight", "train", "name"}


@dataclass(frozen=True)
class Form:
    """How rows are read: one of `FORMS`, and which column holds what (``columns[ours] = theirs``)."""

    name: str
    columns: dict[str, str] = field(default_factory=dict)

    def column(self, ours: str) -> str:
        return self.columns.get(ours, ours)

    def needs(self) -> list[str]:
        return [self.column(ours) for ours in FORMS[self.name][0]]

    def describe(self) -> str:
        """``sharegpt (conversations: from/value)``: the form and its mapping, for people."""
        column = self.column
        mapping = {
            "messages": f"{column('messages')}: role/content",
            "sharegpt": f"{column('conversations')}: from/value",
            "alpaca": f"user: {column('instruction')} + {column('input')}, assistant: {column('output')}",
            "prompt_completion": f"prompt: {column('prompt')}, completion: {column('completion')}",
            "text": f"{column('text')}: every token supervised",
        }
        return f"{self.name} ({mapping[self.name]})"


def detect(row: dict[str, Any], columns: dict[str, str] | None = None) -> Form | None:
    """The form of a row, from its columns (renamed by ``columns``) and what they hold; None if it has none.

    The order decides: a row with ``messages`` and ``prompt``, or with ``instruction`` and the rendered ``text``, as
    many published sets have it, is taken for the first of the two, and the other column is reported as unused.
    """
    columns = dict(columns or {})
    for name, ours, theirs in (("messages", "messages", "conversations"), ("sharegpt", "conversations", "messages")):
        # Either name is in use with either kind of turn; the keys of the turn decide.
        for column in dict.fromkeys((columns.get(ours, ours), columns.get(theirs, theirs))):
            if _turn_form(row.get(column), default=name if column == ours else "") == name:
                return Form(name, {**_without(columns, theirs), **({ours: column} if column != ours else {})})
    for name in ("alpaca", "prompt_completion"):
        if _has(row, form := Form(name, columns)):
            return form
    for prompt, completion in _PAIRS if not columns else ():
        if _has(row, form := Form("prompt_completion", {"prompt": prompt, "completion": completion})):
            return form
    return form if _has(row, form := Form("text", columns)) else None


def convert(row: dict[str, Any], form: Form, unused: set[str]) -> Conversation:
    """The row as a conversation (without file and line).

    What holds something and is not used (columns, keys of messages) is added to ``unused``. Raises `DataError` naming
    the fault and its cure.
    """
    needed, optional = FORMS[form.name]
    missing = [column for column in form.needs() if row.get(column) is None]
    if missing:
        found = ", ".join(map(repr, row)) or "no columns"
        raise DataError(f"the form {form.name} needs {' and '.join(map(repr, missing))}, found {found}; {CURE}")
    used = {form.column(ours) for ours in (*needed, *optional)}
    unused |= {f"column {key!r}" for key in row.keys() - used if row[key] not in (None, "", [], {})}
    values = {ours: row.get(form.column(ours)) for ours in (*needed, *optional)}
    if form.name == "text":
        if not isinstance(values["text"], str) or not values["text"].strip():
            got = "an empty one" if isinstance(values["text"], str) else kind(values["text"])
            raise DataError(f"{form.column('text')!r} must be a text, got {got}")
        return {"text": values["text"]}
    messages = _READERS[form.name](values, form, unused)
    return _conversation(messages, values)


CURE = "set format: and columns: of the source"


def with_thinking(conversation: Conversation, thinking: str) -> Conversation:
    """A row's own ``enable_thinking`` is stronger than its source's."""
    if thinking == "auto" or "messages" not in conversation:
        return conversation
    kwargs = {"enable_thinking": thinking == "on", **(conversation.get("chat_template_kwargs") or {})}
    return {**conversation, "chat_template_kwargs": kwargs}


def _conversation(messages: list[Message], values: dict[str, Any]) -> Conversation:
    system = values.get("system")
    if system:
        if not isinstance(system, str):
            raise DataError(f"the system column must hold a text, got {kind(system)}")
        if messages and messages[0]["role"] == "system" and messages[0]["content"] != system:
            raise DataError("a system column and a different system message in one row; keep one")
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant turn, so nothing could be trained; add one or remove the row")
    conversation: Conversation = {"messages": messages}
    tools = read_tools(values.get("tools"))
    if tools:
        conversation["tools"] = tools
    options = from_json_text(values.get("chat_template_kwargs") or None, "'chat_template_kwargs'")
    if options is not None:
        if not isinstance(options, dict):
            raise DataError(f"'chat_template_kwargs' must be a dict, got {kind(options)}")
        conversation["chat_template_kwargs"] = options
    return conversation


# ------------------------------------------------------------------ one reader per form


def _from_messages(values: dict[str, Any], form: Form, unused: set[str]) -> list[Message]:
    return _messages(values["messages"], form.column("messages"), unused)


def _messages(turns: Any, column: str, unused: set[str]) -> list[Message]:
    result = []
    for index, turn in enumerate(_list_of_turns(turns, column)):
        try:
            result += read_message(turn, unused)
        except DataError as error:
            raise DataError(f"message {index}: {error}") from None
    return result


def _from_sharegpt(values: dict[str, Any], form: Form, unused: set[str]) -> list[Message]:
    result: list[Message] = []
    for index, turn in enumerate(_list_of_turns(values["conversations"], form.column("conversations"))):
        try:
            messages = read_message(_sharegpt_turn(turn, unused), unused)
        except DataError as error:
            raise DataError(f"turn {index}: {error}") from None
        # ShareGPT has the words before a call as a turn of their own; the model writes both in one.
        both = result and result[-1]["role"] == messages[0]["role"] == "assistant" and "tool_calls" in messages[0]
        if both and "tool_calls" not in result[-1]:
            result[-1] = {**messages[0], **result[-1]}
        else:
            result += messages
    return result


def _sharegpt_turn(turn: Any, unused: set[str]) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"expected an object with 'from' and 'value', got {kind(turn)}")
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(f"unknown speaker {turn.get('from')!r}; use one of {', '.join(_SHAREGPT_ROLES)}")
    unused |= {f"turn key {key!r}" for key in turn.keys() - _SHAREGPT_KEYS if turn[key] not in (None, "", [], {})}
    kept = {key: turn[key] for key in ("weight", "loss_weight", "train", "name") if key in turn}
    if role != "function_call":
        return {"role": role, "content": turn.get("value"), **kept}
    calls = from_json_text(turn.get("value"), "the function call")
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **kept}


def _from_alpaca(values: dict[str, Any], form: Form, unused: set[str]) -> list[Message]:
    """The question: instruction, blank line, input. ``history`` holds earlier [question, answer] pairs."""
    messages = []
    history = from_json_text(values.get("history") or [], "'history'")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("'history' must be a list of [question, answer] pairs")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for key in ("instruction", "input"):
        if values[key] is not None and not isinstance(values[key], str):
            raise DataError(f"{form.column(key)!r} must be a text, got {kind(values[key])}")
    question = "\n\n".join(text for text in (values["instruction"], values["input"]) if text)
    if not question.strip():
        raise DataError(f"{form.column('instruction')!r} is empty; fill it in or remove the row")
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": values["output"]}]
    return _messages(messages, form.column("output"), unused)


def _from_pair(values: dict[str, Any], form: Form, unused: set[str]) -> list[Message]:
    """Only the completion is supervised: assistant turns of the prompt get ``train: false`` if they have none."""
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and not prompt.strip():
        raise DataError(f"{form.column('prompt')!r} is empty; use format: text to train on texts without a question")
    before = _side(prompt, "user", form.column("prompt"), unused)
    earlier = [{"train": False, **message} if message["role"] == "assistant" else message for message in before]
    return earlier + _side(completion, "assistant", form.column("completion"), unused)


def _side(value: Any, role: str, column: str, unused: set[str]) -> list[Message]:
    turns = value if isinstance(value, list) else [{"role": role, "content": value}]
    try:
        return _messages(turns, column, unused)
    except DataError as error:
        raise DataError(f"{column!r}: {str(error).removeprefix('message 0: ')}") from None


_READERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_pair,
}


# ------------------------------------------------------------------ looking at a row


def _list_of_turns(turns: Any, column: str) -> list[Any]:
    turns = from_json_text(turns, repr(column))
    if not isinstance(turns, list) or not turns:
        got = "an empty list" if turns == [] else kind(turns)
        raise DataError(f"expected a list {column!r} with at least one message, got {got}")
    return turns


def _turn_form(turns: Any, default: str) -> str:
    """``messages`` or ``sharegpt`` for a list of turns (or JSON text of one), by the keys of its first turn;
    ``default`` for an empty list, and "" for what is no list."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = from_json_text(turns, "")
        except DataError:
            return ""
    if not isinstance(turns, list):
        return ""
    if not turns:
        return default
    return "sharegpt" if isinstance(turns[0], dict) and "from" in turns[0] and "role" not in turns[0] else "messages"


def _has(row: dict[str, Any], form: Form) -> bool:
    return all(row.get(column) is not None for column in form.needs())


def _without(columns: dict[str, str], key: str) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours != key}
