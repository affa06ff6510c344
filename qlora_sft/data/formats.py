"""Convert rows in any of the usual forms (see `forms`) to conversations."""

from __future__ import annotations

from qlora_sft.config_data import FORMS
from qlora_sft.data.calls import read_tools
from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.data.forms import RowForm as RowForm
from qlora_sft.data.forms import detect as detect
from qlora_sft.data.messages import MESSAGE_KEYS, read_message
from qlora_sft.data.parts import refuse_media_keys, text_of_blocks
from qlora_sft.data.prerendered import ends_a_turn, refuse_rendered_prompt
from qlora_sft.data.thinking import has_lone_close
from qlora_sft.data.tool_turns import UNANSWERED, UNDECLARED, paired, undeclared
from qlora_sft.data.values import EMPTY, anything, from_json_text, idle_keys, kind
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonList, JsonObject

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
    **{"system": "system", "function_call": "function_call", "tool_call": "function_call"},
}
# Columns of unpaired preference data: TRL's and ms-swift's, LLaMA-Factory's.
UNDESIRED = "label: false, an answer that is not wanted"
UNDESIRED_COLUMNS = ("label", "kto_tag")
_SHAREGPT_KEYS = {"from", "value", *MESSAGE_KEYS} - {"role", "content"}


def convert(row: JsonObject, form: RowForm, unused: set[str], notes: set[str] | None = None) -> Conversation:
    """Returns the row as a conversation, without file and line.

    Columns and message keys that hold something and are not used are added to ``unused``; remarkable facts that are not
    faults are added to ``notes``. Raises `DataError` naming the fault and its cure.
    """
    needed, optional = FORMS[form.name]
    missing = [column for column in form.needs() if row.get(column) is None]
    if missing:
        found = ", ".join(map(repr, row)) or "no columns"
        raise DataError(f"the form {form.name} needs {' and '.join(map(repr, missing))}, found {found}; {CURE}")
    values = {ours: row.get(form.column(ours)) for ours in (*needed, *optional)}
    used = {form.column(ours) for ours in (*needed, *optional)}
    if "tools" in values:
        values["tools"] = _tools(row, form.column("tools"), used)
    # A text beside a truth value is a row of some classification.
    undesired = form.name != "text" and _undesired(row, used)
    refuse_media_keys(row, used, "column")
    unused |= idle_keys(row, used, "column")
    refuse_preferences(row, used)
    if form.name == "text":
        if not isinstance(values["text"], str) or not values["text"].strip():
            got = "an empty one" if isinstance(values["text"], str) else kind(values["text"])
            raise DataError(f"{form.column('text')!r} must be a text, got {got}")
        return {"text": values["text"]}
    messages = _READERS[form.name](values, form, unused)
    conversation = _conversation(messages, values, form, unused, set() if notes is None else notes)
    return {**conversation, "undesired": True} if undesired else conversation


def _tools(row: JsonObject, column: str, used: set[str]) -> object:
    """Returns the content of the tools column, or of OpenAI's older column of functions if it describes some."""
    tools = anything(row.get(column), "'tools'")
    try:
        functions = anything(row.get("functions"), "'functions'")
    except DataError:
        return tools  # a text of another kind
    described = isinstance(functions, list) and all(
        isinstance(e, dict) and {"name", "function"} & e.keys() for e in functions
    )
    if functions is None or (tools is None and described):
        used.add("functions")
    return functions if tools is None and described else tools


def _undesired(row: JsonObject, used: set[str]) -> bool:
    """Says whether the row is one of unpaired preference data (KTO) whose answer is not wanted.

    Its mark is a truth value, or the text that a table has for one; a number is a class of something else.
    """
    marks = {column: row.get(column) for column in UNDESIRED_COLUMNS if column not in used}
    marks = {column: mark for column, mark in marks.items() if str(mark) in ("True", "False", "true", "false")}
    used.update(marks)
    return any(str(mark).lower() == "false" for mark in marks.values())


def refuse_preferences(row: JsonObject, used: set[str]) -> None:
    chosen = row.get("chosen")
    if "chosen" not in used and isinstance(chosen, str | list | dict) and chosen:
        raise DataError(
            "'chosen' is an answer of preference data, which would not be trained; make it the last turn, map it "
            "(columns: {completion: chosen} beside a prompt, {messages: chosen} if it has all turns), or remove it"
        )


def convert_noting(row: JsonObject, form: RowForm) -> Conversation:
    """Converts the row as `convert` does and keeps what is remarkable about it, unused
    keys included, under ``notes``."""
    unused: set[str] = set()
    notes: set[str] = set()
    conversation = convert(row, form, unused, notes)
    told = [*(f"rows with the unused {what}" for what in sorted(unused)), *sorted(notes)]
    return {**conversation, "notes": told} if told else conversation


CURE = "set format: and columns: of the source"


def with_thinking(conversation: Conversation, thinking: str) -> Conversation:
    """Returns the conversation with its source's ``enable_thinking``, unless the row has its own."""
    if thinking == "auto" or "messages" not in conversation:
        return conversation
    kwargs = {"enable_thinking": thinking == "on", **(conversation.get("chat_template_kwargs") or {})}
    return {**conversation, "chat_template_kwargs": kwargs}


def _conversation(
    messages: list[Message], values: JsonObject, form: RowForm, unused: set[str], notes: set[str]
) -> Conversation:
    system = _system(values.get("system"), unused)
    if system:
        if messages and messages[0]["role"] == "system" and messages[0]["content"] != system:
            raise DataError("a system column and a different system message in one row; keep one")
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant turn, so nothing could be trained; add one or remove the row")
    conversation: Conversation = {"messages": paired(messages, notes, together=form.name == "sharegpt")}
    if conversation["messages"] is not messages:
        conversation["paired"] = True
    tools = read_tools(values.get("tools"))
    if tools:
        conversation["tools"] = tools
        if undeclared(messages, tools):
            notes.add(UNDECLARED)
    if form.think_tags and any(has_lone_close(m["content"]) for m in messages if m["role"] == "assistant"):
        notes.add("rows with a </think> in an answer that no <think> opened, trained as text")
    if any(ends_a_turn(m["content"][-40:]) for m in messages if m["role"] == "assistant"):
        notes.add("rows with an answer that has an end of turn written at its end, which is kept as text")
    if messages[-1]["role"] != "assistant":
        notes.add(UNANSWERED)
    options = anything(values.get("chat_template_kwargs"), "'chat_template_kwargs'")
    if options is not None:
        if not isinstance(options, dict):
            raise DataError(f"'chat_template_kwargs' must be a dict, got {kind(options)}")
        conversation["chat_template_kwargs"] = options
    return conversation


def _system(system: object, unused: set[str]) -> str:
    """Returns the text of the system column: a text, or Anthropic's list of text blocks."""
    if system in EMPTY:
        return ""
    if not isinstance(system, str | list):
        raise DataError(f"the system column must hold a text, got {kind(system)}")
    return text_of_blocks(system, "the system column", unused)


# ------------------------------------------------------------------ one reader per form


def _from_messages(values: JsonObject, form: RowForm, unused: set[str]) -> list[Message]:
    return _messages(values["messages"], form.column("messages"), form, unused)


def _messages(turns: object, column: str, form: RowForm, unused: set[str]) -> list[Message]:
    result = []
    for index, turn in enumerate(_list_of_turns(turns, column)):
        try:
            result += read_message(turn, unused, form.think_tags)
        except DataError as error:
            raise DataError(f"message {index}: {error}") from None
    return result


def _from_sharegpt(values: JsonObject, form: RowForm, unused: set[str]) -> list[Message]:
    result: list[Message] = []
    for index, turn in enumerate(_list_of_turns(values["conversations"], form.column("conversations"))):
        try:
            messages = read_message(_sharegpt_turn(turn, unused), unused, form.think_tags)
        except DataError as error:
            text = str(error)  # which is about the message that the turn has become
            own = text.replace("'content'", "'value'", 1) if text.startswith("'content'") else text
            raise DataError(f"turn {index}: {own}") from None
        # ShareGPT has the words before a call as a turn of their own; the model writes both in one.
        if result and _words_before_a_call(result[-1], messages[0]):
            result[-1] = {**messages[0], **result[-1]}
        else:
            result += messages
    return result


def _words_before_a_call(words: Message, call: Message) -> bool:
    """Says whether a text and the tool call after it are one turn of the assistant.

    They are if the second has nothing but its call and both have the same weight in the loss.
    """
    if not (words["role"] == call["role"] == "assistant" and "tool_calls" in call and "tool_calls" not in words):
        return False
    alike = all(words.get(key) == call.get(key) for key in ("train", "weight", "name"))
    return alike and not call["content"] and "reasoning" not in call


def _sharegpt_turn(turn: object, unused: set[str]) -> JsonObject:
    if not isinstance(turn, dict):
        raise DataError(f"expected an object with 'from' and 'value', got {kind(turn)}")
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(f"unknown speaker {turn.get('from')!r}; use one of {', '.join(_SHAREGPT_ROLES)}")
    unused |= idle_keys(turn, _SHAREGPT_KEYS, "turn key")
    kept = {key: turn[key] for key in _SHAREGPT_KEYS - {"from", "value"} if key in turn}
    if role != "function_call":
        return {"role": role, "content": turn.get("value"), **kept}
    if kept.get("tool_calls") not in EMPTY:
        raise DataError("the function call is given twice, by 'value' and 'tool_calls'; keep one")
    calls = from_json_text(turn.get("value"), "the function call")
    return {"role": "assistant", "content": "", **kept, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _from_alpaca(values: JsonObject, form: RowForm, unused: set[str]) -> list[Message]:
    """Reads an Alpaca row. The question is instruction, blank line, input; ``history``
    holds earlier [question, answer] pairs."""
    messages = []
    history = anything(values.get("history"), "'history'") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("'history' must be a list of [question, answer] pairs")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked: list[str] = []
    for key in ("instruction", "input"):
        text = values[key]
        if text is not None and not isinstance(text, str):
            raise DataError(f"{form.column(key)!r} must be a text, got {kind(text)}")
        if text:
            asked.append(text)
    question = "\n\n".join(asked)
    refuse_rendered_prompt(question, form.column("instruction"))
    if not question.strip():
        raise DataError(f"{form.column('instruction')!r} is empty; fill it in or remove the row")
    answer = values["output"]
    if isinstance(answer, list) and any(isinstance(each, str) for each in answer):
        several = "a list of texts, which would be one answer; write a row for each, or join them"
        raise DataError(f"{form.column('output')!r} must be a text, got {several}")
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _messages(messages, form.column("output"), form, unused)


def _from_pair(values: JsonObject, form: RowForm, unused: set[str]) -> list[Message]:
    """Reads a prompt and its completion.

    Only the completion is supervised: assistant turns of the prompt get ``train: false`` if they do not say otherwise.
    """
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and not prompt.strip():
        raise DataError(f"{form.column('prompt')!r} is empty; use format: text to train on texts without a question")
    if isinstance(prompt, str):
        refuse_rendered_prompt(prompt, form.column("prompt"))
    before = _side(prompt, "user", form.column("prompt"), form, unused)
    earlier: list[Message] = [
        {"train": False, **message} if message["role"] == "assistant" else message for message in before
    ]
    after = _side(completion, "assistant", form.column("completion"), form, unused)
    if after[: len(before)] == before:
        raise DataError(
            f"{form.column('completion')!r} begins with the prompt, which would be asked twice; map it alone "
            f"(format: messages, columns: {{messages: {form.column('completion')}}}), or take the prompt out of it"
        )
    return earlier + after


def _side(value: object, role: str, column: str, form: RowForm, unused: set[str]) -> list[Message]:
    turns = value if isinstance(value, list) else [{"role": role, "content": value}]
    try:
        return _messages(turns, column, form, unused)
    except DataError as error:
        raise DataError(f"{column!r}: {str(error).removeprefix('message 0: ')}") from None


_READERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_pair,
}


# ------------------------------------------------------------------ looking at a row


def _list_of_turns(turns: object, column: str) -> JsonList:
    turns = from_json_text(turns, repr(column))
    if not isinstance(turns, list) or not turns:
        got = "an empty list" if turns == [] else kind(turns)
        raise DataError(f"expected a list {column!r} with at least one message, got {got}")
    return turns
