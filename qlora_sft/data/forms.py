"""Recognise the form of a row.

- ``messages``: ``{messages: [{role, content, ...}], tools?, system?, chat_template_kwargs?}``
- ``sharegpt``: ``{conversations: [{from, value}], tools?, system?}``
- ``alpaca``: ``{instruction, output, input?, history?, system?}``
- ``prompt_completion``: ``{prompt, completion, ...}``, texts or lists of messages; also question/answer
- ``text``: ``{text}``, every token supervised: continued pre-training and replay
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qlora_sft.config_data import FORMS
from qlora_sft.data.values import from_json_text
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject

# Column names that leave no doubt about which is the question and which the answer.
_PAIRS = (("prompt", "response"), ("question", "answer"), ("query", "response"), ("problem", "solution"))


@dataclass(frozen=True)
class RowForm:
    """Says how rows are read: one of `FORMS`, and which column holds what (``columns[ours] = theirs``)."""

    name: str
    columns: dict[str, str] = field(default_factory=dict)
    think_tags: bool = True
    """Whether ``<think>`` in an answer is its reasoning, and not a text like any other."""

    def column(self, ours: str) -> str:
        """Returns the column of the rows that holds what we call ``ours``."""
        return self.columns.get(ours, ours)

    def needs(self) -> list[str]:
        """Returns the columns that every row must have."""
        return [self.column(ours) for ours in FORMS[self.name][0]]

    def describe(self) -> str:
        """Returns the form and its mapping for people: ``sharegpt (conversations: from/value)``."""
        column = self.column
        mapping = {
            "messages": f"{column('messages')}: role/content",
            "sharegpt": f"{column('conversations')}: from/value",
            "alpaca": f"user: {column('instruction')} + {column('input')}, assistant: {column('output')}",
            "prompt_completion": f"prompt: {column('prompt')}, completion: {column('completion')}",
            "text": f"{column('text')}: every token supervised",
        }
        return f"{self.name} ({mapping[self.name]})"


def detect(row: JsonObject, columns: dict[str, str] | None = None) -> RowForm | None:
    """Returns the form of a row, judged by its columns (renamed by ``columns``) and what they hold; None if it has
    none.

    The order decides. A row with ``messages`` and ``prompt``, or with ``instruction`` and the rendered ``text``, as
    many published sets have it, has the first of the two forms, and the other column is reported as unused.
    """
    columns = dict(columns or {})
    for name, ours, theirs in (("messages", "messages", "conversations"), ("sharegpt", "conversations", "messages")):
        # Either name is in use with either kind of turn; the keys of the turn decide.
        for column in dict.fromkeys((columns.get(ours, ours), columns.get(theirs, theirs))):
            if _turn_form(row.get(column), default=name if column == ours else "") == name:
                return RowForm(name, {**_without(columns, theirs), **({ours: column} if column != ours else {})})
    for name in ("alpaca", "prompt_completion"):
        if _has(row, form := RowForm(name, columns)):
            return form
    for prompt, completion in _PAIRS if not columns else ():
        if _has(row, form := RowForm("prompt_completion", {"prompt": prompt, "completion": completion})):
            return form
    return form if _has(row, form := RowForm("text", columns)) else None


def _turn_form(turns: object, default: str) -> str:
    """Returns ``messages`` or ``sharegpt`` for a list of turns (or its JSON text), judged by the keys of its first
    turn.

    An empty list gives ``default``; anything but a list gives an empty text.
    """
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


def _has(row: JsonObject, form: RowForm) -> bool:
    return all(row.get(column) is not None for column in form.needs())


def _without(columns: dict[str, str], key: str) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours != key}
