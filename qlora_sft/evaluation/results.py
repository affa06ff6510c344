"""Writes the results of a task into ``RUN/evaluation/``, as a pair of files."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from qlora_sft.atomic import write_json, written_file
from qlora_sft.evaluation.ask import Questions, Scores
from qlora_sft.evaluation.compare import TaskReport
from qlora_sft.json_types import JsonObject, read_object

# What all tasks together say; no task has this name for itself.
DIAGNOSIS = "diagnosis.json"
# Two results with these in common are of the same questions, asked in the same way.
ASKED = ("questions", "form", "items", "samples", "temperature", "max_new_tokens", "thinking", "shots", "phrasing")


def write_results(folder: Path, report: TaskReport, questions: Questions, base: Scores | None, tuned: Scores) -> Path:
    """Writes every question with its answers to ``NAME.jsonl`` and the figures to ``NAME.json``. Returns the former."""
    task, rows = questions.task, []
    # A task that only reads texts leaves out those in which nothing is to be predicted, so its records have no items.
    items = task.items if task.form != "loss" else [None] * len(tuned.records)
    for number, item in enumerate(items):
        row: JsonObject = {"tuned": tuned.records[number]}
        if base is not None:
            row = {"base": base.records[number], **row}
        if item is not None:
            asked = item.conversation["messages"][-1]["content"]
            row = {"place": item.place, "question": asked, "reference": item.reference, **row}
            row["conversation"] = dict(item.conversation)
            if item.shown:
                row["shown"] = item.shown
            if questions.in_thought and questions.in_thought[number]:
                row["in_thought"] = True
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    name = _free_name(folder, report)
    answers = folder / f"{name}.jsonl"
    with written_file(answers) as beside:
        beside.write_text("".join(rows), encoding="utf-8")
    write_json(folder / f"{name}.json", report.to_json())
    return answers


def _free_name(folder: Path, report: TaskReport) -> str:
    """Returns the task's name, with a number behind it where other results have that name already.

    Results of another file, or of the same file asked in another way, are never replaced: they may have taken hours.
    """
    asked = (*ASKED, "seed")
    own = report.to_json()
    for number in count(1):
        name = report.name + (f"-{number}" if number > 1 else "")
        if f"{name}.json" == DIAGNOSIS:
            continue
        file = folder / f"{name}.json"
        earlier = _read(file) if file.is_file() else own
        same = all(earlier.get(key) == own.get(key) for key in asked)
        if same and ("base" in own or "base" not in earlier):
            return name
    raise AssertionError("count does not end")


def _read(file: Path) -> JsonObject:
    """Reads earlier results; damaged ones are empty, and so they are never those that are written now."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}
