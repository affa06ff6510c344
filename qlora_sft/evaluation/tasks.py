"""Reads files of questions into items that can be asked and graded, and recognises the form of each file:

- ``choices``: ``question``, ``choices`` (or ``options``, or columns A, B, ...) and ``answer`` (or ``answerKey``,
  ``answer_index``), as MMLU's (texts, and a number) or ARC's (``{text, label}``, and a label)
- ``code``: ``{prompt, test, entry_point}`` as HumanEval's; ``test`` defines ``check(candidate)``
- ``number``: any conversation whose last answer has a line ``#### 18``, as GSM8K's
- ``exact``: any other conversation; its last answer is the reference
- ``refusal``: questions, with or without answers, that are to be answered at all; never detected
- ``loss``: plain texts, and conversations if ``form`` says so, on which the loss of the model is measured

Conversations can have any form that training data can have.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import takewhile

from qlora_sft.config import TaskConfig, task_name
from qlora_sft.data.conversation import Conversation, Message
from qlora_sft.data.formats import UNDESIRED, convert, detect, with_thinking
from qlora_sft.data.row_faults import RowFaults
from qlora_sft.data.sources import open_evaluation
from qlora_sft.data.values import kind
from qlora_sft.errors import DataError
from qlora_sft.evaluation.benign import BENIGN
from qlora_sft.evaluation.examples import rephrased, with_examples
from qlora_sft.evaluation.grade import last_number, marked_number
from qlora_sft.evaluation.item import Item as Item
from qlora_sft.evaluation.item import TaskForm as TaskForm
from qlora_sft.evaluation.programs import UnitTests
from qlora_sft.json_types import JsonObject
from qlora_sft.say import Say

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Task:
    """Holds a file of questions with the settings by which they are asked."""

    name: str
    form: TaskForm
    items: list[Item]
    settings: TaskConfig
    asks_again: str | None = None
    """The task whose questions are asked in another way here."""


def read_tasks(tasks: list[TaskConfig], seed: int, say: Say) -> list[Task]:
    """Reads and checks all tasks, and prints what was detected. Raises `DataError` with file and line of all faults."""
    result, problems = [], []
    for task in tasks:
        try:
            result.append(_read(task, seed, say))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return result


def _read(task: TaskConfig, seed: int, say: Say) -> Task:
    """Reads one task. Raises `DataError` as `read_tasks` does."""
    name = task_name(task)
    items: list[Item] = []
    faults = RowFaults()
    unused: dict[str, str] = {}
    undesired: list[str] = []
    form: TaskForm | None = None if task.form == "auto" else task.form
    if task.path == "benign" and form is None:
        form = "refusal"
    for label, read, _ in open_evaluation(str(BENIGN) if task.path == "benign" else task.path):
        for line, row, fault in read():
            place = f"{label}:{line}"
            try:
                if fault is not None:
                    raise DataError(fault)
                if not isinstance(row, dict):
                    raise DataError(f"expected an object with columns, got {kind(row)}")
                form = form or recognise(row)
                not_asked: set[str] = set()
                item = _item(row, form, place, task, not_asked)
                if item.conversation.get("undesired"):
                    undesired.append(place)
                else:
                    items.append(item)
                unused = {**dict.fromkeys(sorted(not_asked), place), **unused}
            except DataError as error:
                faults.add(place, str(error))
            if faults.enough:
                raise DataError("\n".join(faults.lines(task.path)))
    if faults:
        raise DataError("\n".join(faults.lines(task.path)))
    if not items or form is None:
        raise DataError(f"{task.path}: the file has no questions")
    total = len(items)
    if task.max_rows is not None and task.max_rows < total:
        chosen = sorted(random.Random(f"tasks {seed} {name}").sample(range(total), task.max_rows))
        items = [items[i] for i in chosen]
    if task.phrasing != "plain":
        items = [rephrased(item, task.phrasing) for item in items]
    if task.shots and form in ("code", "refusal"):
        raise DataError(f"{name}: shots needs answers to show, and form {form} has none; remove it")
    if task.shots:
        items = with_examples(items, task.shots, form, seed)
    verb = "detected" if task.form == "auto" else "configured"
    idle = [key for key, given in (("samples", task.samples > 1), ("thinking", task.thinking == "on")) if given]
    effect = f"; {' and '.join(idle)} without effect" if idle and form in ("choices", "loss") else ""
    say(f"{name}: {verb} {form}, {len(items):,} of {total:,} items{effect}")
    if undesired:
        say(f"{name}: {len(undesired):,} rows left out ({UNDESIRED}; first {undesired[0]})")
    if unused:
        listed = ", ".join(f"{what} (first in {where})" for what, where in unused.items())
        say(f"{name}: not asked: {listed}")
    return Task(name, form, items, task)


def recognise(row: JsonObject) -> TaskForm:
    """Recognises the form of a row by its columns. For a conversation, how its answer ends decides."""
    if _choices_of(row) is not None and _answer_of(row) is not None:
        return "choices"
    if all(isinstance(row.get(key), str) for key in ("prompt", "test", "entry_point")):
        return "code"
    conversation = _conversation(row, set())
    if "text" in conversation:
        return "loss"
    return "exact" if marked_number(conversation["messages"][-1].get("content") or "") is None else "number"


def _item(row: JsonObject, form: TaskForm, place: str, task: TaskConfig, unused: set[str]) -> Item:
    """Makes an item of a row. Adds to ``unused`` what the row holds and the item does not. Raises `DataError`."""
    if form == "choices":
        question, letter, options = choice_question(row)
        # The letter has to be the first token, so the model cannot think before it.
        thinking = "off" if task.thinking == "off" else "auto"
        return Item(place, _asked(question, thinking), reference=letter, options=options)
    if form == "refusal":
        return Item(place, with_thinking(_question(row, unused), task.thinking))
    if form == "code":
        tests = _tests(row)
        return Item(place, _asked(CODE_QUESTION.format(prompt=tests.prompt), task.thinking), tests=tests)
    conversation = with_thinking(_conversation(row, unused), task.thinking)
    if form == "loss":
        return Item(place, conversation)
    if "text" in conversation:
        raise DataError(f"a plain text has no question; form {form} needs a conversation, form loss does not")
    *earlier, answer = conversation["messages"]
    if answer["role"] != "assistant" or not earlier:
        raise DataError("the last message must be the assistant's, which is the reference; remove what follows it")
    reference = (answer.get("content") or "").strip()
    if form == "number":
        number = last_number(reference)
        if number is None:
            raise DataError(f"the answer {reference[-40:]!r} holds no number; set form: exact")
        reference = number
    elif answer.get("tool_calls"):
        raise DataError("the last message is a tool call, which no task grades; measure it as held-out data")
    elif not reference:
        raise DataError("the last message is empty")
    kept: Message = {"role": answer["role"], "content": answer["content"]}
    if "reasoning" in answer:
        kept["reasoning"] = answer["reasoning"]
    return Item(place, {**conversation, "messages": earlier}, kept, reference)


def _question(row: JsonObject, unused: set[str]) -> Conversation:
    """Returns the question of a row that may have an answer or none. Raises `DataError` if it has no question."""
    alone = next((row[key] for key in ("question", "prompt") if isinstance(row.get(key), str)), None)
    if isinstance(alone, str) and len(row) == 1:
        return {"messages": [{"role": "user", "content": alone}]}
    conversation = _conversation(row, unused)
    messages = conversation.get("messages") or []
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError("a plain text or an answer without a question cannot be asked")
    return {**conversation, "messages": messages}


def _conversation(row: JsonObject, unused: set[str]) -> Conversation:
    """Converts a row that is a conversation. Raises `DataError` if it is none, naming its columns."""
    form = detect(row)
    if form is None:
        raise DataError(
            f"expected question, choices and answer; prompt, test and entry_point; or a conversation in any form of "
            f"training data; found {', '.join(map(repr, row)) or 'no columns'}"
        )
    return convert(row, form, unused)


def _asked(question: str, thinking: str) -> Conversation:
    """Makes a conversation of one question."""
    return with_thinking({"messages": [{"role": "user", "content": question}]}, thinking)


# ------------------------------------------------------------------ choices


def choice_question(row: JsonObject) -> tuple[str, str, int]:
    """Returns the question with its lettered options, the right letter, and the number of options.

    Raises `DataError` for a row that has no such question.
    """
    question, choices = row.get("question"), _choices_of(row)
    if not isinstance(question, str) or not question.strip():
        raise DataError("'question' must be a text")
    given, labels = choices, []
    if isinstance(choices, dict):
        given, named = choices.get("text"), choices.get("label")
        labels = list(map(str, named)) if isinstance(named, list | str) else []
    texts = [text for text in given if isinstance(text, str)] if isinstance(given, list) else []
    if not isinstance(given, list) or len(texts) < len(given):
        raise DataError(
            "'choices' must be a list of texts, an object with lists 'text' and 'label', or columns A, B, ..."
        )
    if not 2 <= len(texts) <= len(LETTERS):
        raise DataError(f"there must be 2 to {len(LETTERS)} choices, found {len(texts)}")
    # With columns A, B, ... the answer is a letter, whatever the texts are.
    in_columns = not any(row.get(key) is not None for key in ("choices", "options"))
    right = _right(_answer_of(row), texts, list(LETTERS[: len(texts)]) if in_columns else labels)
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return f"{question.strip()}\n\n{listed}\n\nAnswer with the letter only.", LETTERS[right], len(texts)


def _choices_of(row: JsonObject) -> object:
    """Returns the choices of a row, from the column of that name or from columns A, B, ...; None if it has neither."""
    given = next((row[key] for key in ("choices", "options") if row.get(key) is not None), None)
    if given is not None:
        return given
    columns = list(takewhile(lambda letter: isinstance(row.get(letter), str), LETTERS))
    return [row[letter] for letter in columns] if len(columns) > 1 else None


def _answer_of(row: JsonObject) -> object:
    """Returns the answer of a row of multiple choice, from the first of its columns that holds something."""
    return next((row[key] for key in ("answer_index", "answerKey", "answer") if row.get(key) is not None), None)


def _right(answer: object, texts: list[str], labels: list[str]) -> int:
    """Finds the position of the right choice by its label (ARC's may be 1 to 4), number from 0, letter or text.

    Raises `DataError` if the answer names none of the choices, or more than one.
    """
    if len(labels) == len(texts) and str(answer) in labels:
        return labels.index(str(answer))
    if isinstance(answer, int) and not isinstance(answer, bool) and not labels and 0 <= answer < len(texts):
        return answer
    readings = set()
    if isinstance(answer, str):
        if len(answer) == 1 and answer in LETTERS[: len(texts)]:
            readings.add(LETTERS.index(answer))
        if answer in texts:
            readings.add(texts.index(answer))
        if answer.isdecimal() and not labels and int(answer) < len(texts) and not readings:
            readings.add(int(answer))
    if len(readings) > 1:
        raise DataError(f"the answer {answer!r} is the letter of one choice and the text of another; give its number")
    if not readings:
        raise DataError(f"the answer {answer!r} is none of the {len(texts)} choices")
    return readings.pop()


# ------------------------------------------------------------------ code

CODE_QUESTION = (
    "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}\n```"
)


def _tests(row: JsonObject) -> UnitTests:
    """Reads a HumanEval problem. Raises `DataError` if a column is missing or does not fit."""
    texts: dict[str, str] = {}
    for key in ("prompt", "test", "entry_point"):
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{key!r} must be a text")
        texts[key] = value
    if f"def {texts['entry_point']}" not in texts["prompt"]:
        raise DataError(f"'prompt' does not define the entry_point {texts['entry_point']!r}")
    return UnitTests(**texts)
