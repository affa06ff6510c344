"""Writes the right answers of an evaluation as training rows.

This is rejection sampling: Yuan et al. 2023, arXiv:2308.01825.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from qlora_sft.atomic import written_file
from qlora_sft.errors import ConfigError
from qlora_sft.evaluation.compare import EvaluationReport, TaskReport
from qlora_sft.json_types import JsonObject

GRADED = ("number", "exact", "code")


def check_target(file: Path) -> None:
    """Raises `ConfigError` if rows cannot be written to ``file``, before an hour of answers and not after it.

    An existing file is not replaced: it may hold the questions, or the rows of an earlier hour.
    """
    if file.is_file():
        raise ConfigError(f"--keep-right: {file} already exists; name a new file, or remove it")
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"--keep-right: {file} cannot be written; name a file in an existing folder")


def keep_right(report: EvaluationReport, file: Path) -> tuple[int, int]:
    """Writes every different right answer of the tuned model behind its question, and returns (rows, questions asked).

    Answers of multiple choice, readings and tasks that ask the same again give no rows. Neither do answers that were
    cut off: they would teach the model to end in the middle.
    """
    rows: list[JsonObject] = []
    asked = 0
    for task in report.tasks:
        if task.form in GRADED and task.asks_again is None:
            asked += task.items
            rows += right_answers(task)
    with written_file(file) as beside:
        beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows), asked


def right_answers(task: TaskReport) -> Iterator[JsonObject]:
    """Yields a training row for each right answer of a task, in the order of its questions; equal answers once."""
    assert task.answers is not None
    with Path(task.answers).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            asked = row["conversation"]
            # What the template wrote at the end of the prompt belongs to the answer, whose thought begins there.
            opener = "<think>" if row.get("in_thought") else ""
            answers = [answer for answer in row["tuned"]["answers"] if answer["right"] and not answer.get("cut_off")]
            for text in dict.fromkeys(answer["text"] for answer in answers):
                question = without_examples(asked["messages"], row.get("shown", 0))
                messages = [*question, {"role": "assistant", "content": opener + text}]
                yield {
                    **{key: asked[key] for key in ("tools", "chat_template_kwargs") if key in asked},
                    "messages": messages,
                }


def without_examples(messages: list[JsonObject], shown: int) -> list[JsonObject]:
    """Returns the messages without the ``shown`` ones that are examples, which are other questions of the task."""
    begin = 1 if messages[0]["role"] == "system" else 0
    return [*messages[:begin], *messages[begin + shown :]]
