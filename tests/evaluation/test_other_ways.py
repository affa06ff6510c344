"""The same questions behind examples and in other words: which ones there are, and what they look like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import TaskConfig
from qlora_sft.errors import DataError
from qlora_sft.evaluation.compare import _digest
from qlora_sft.evaluation.diagnose import in_other_ways
from qlora_sft.evaluation.tasks import read_tasks


def quiet(text: str) -> None:
    """Says nothing."""


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


NUMBERS = [{"question": f"How much is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(8)]


def test_examples_are_other_questions_with_their_answers(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": f"S{i}"}, {"role": "user", "content": f"q{i}"},
                      {"role": "assistant", "content": f"a{i}"}]}
        for i in range(6)
    ]  # fmt: skip
    path = write(tmp_path / "q.jsonl", rows)
    (plain,) = read_tasks([TaskConfig(path)], 0, quiet)
    (task,) = read_tasks([TaskConfig(path, shots=3)], 0, quiet)
    (again,) = read_tasks([TaskConfig(path, shots=3)], 0, quiet)
    assert task == again
    for number, item in enumerate(task.items):
        system, *shown, question = item.conversation["messages"]
        assert (system["content"], question["content"]) == (f"S{number}", f"q{number}")
        asked, answers = [m["content"] for m in shown[::2]], [m["content"] for m in shown[1::2]]
        assert len(asked) == len(set(asked)) == 3
        assert f"q{number}" not in asked
        assert [a[1:] for a in answers] == [q[1:] for q in asked]
        assert item.reference == plain.items[number].reference
    with pytest.raises(DataError, match="6 examples before every question need more than 6 questions"):
        read_tasks([TaskConfig(path, shots=6)], 0, quiet)


def test_letters_are_shown_as_letters(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}?", "choices": ["x", "y"], "answer": i % 2} for i in range(4)]
    (task,) = read_tasks([TaskConfig(write(tmp_path / "c.jsonl", rows), shots=2)], 0, quiet)
    for item in task.items:
        assert {m["content"] for m in item.conversation["messages"] if m["role"] == "assistant"} <= {"A", "B"}


def test_examples_need_answers(tmp_path: Path) -> None:
    code = [{"prompt": "def f(x):\n", "test": "def check(c):\n    pass\n", "entry_point": "f"}] * 3
    with pytest.raises(DataError, match="form code has none"):
        read_tasks([TaskConfig(write(tmp_path / "code.jsonl", code), shots=1)], 0, quiet)


def test_everything_but_texts_is_asked_again(tmp_path: Path) -> None:
    tasks = read_tasks(
        [
            TaskConfig(write(tmp_path / "n.jsonl", NUMBERS)),
            TaskConfig(write(tmp_path / "t.jsonl", [{"text": "Once upon a time."}])),
            TaskConfig("benign", max_rows=5),
        ],
        0,
        quiet,
    )
    again = in_other_ways(tasks, 0)
    assert [(task.name, task.asks_again) for task in again] == [
        ("n-4-shot", "n"), ("n-labelled", "n"), ("n-polite", "n"), ("benign-labelled", "benign"),
        ("benign-polite", "benign"),
    ]  # fmt: skip
    assert again[1].items[0].conversation["messages"][-1]["content"] == "Question: How much is 0 and 0?\n\nAnswer:"
    assert all(task.settings.phrasing != "plain" or task.settings.shots for task in again)


def test_more_tests_of_the_same_problems_are_other_questions(tmp_path: Path) -> None:
    def digest(test: str) -> str:
        row = {"prompt": "def f(x):\n", "test": f"def check(c):\n    {test}\n", "entry_point": "f"}
        (task,) = read_tasks([TaskConfig(write(tmp_path / "code.jsonl", [row]))], 0, quiet)
        return _digest(task)

    assert digest("pass") == digest("pass") != digest("assert c(1) == 2")
