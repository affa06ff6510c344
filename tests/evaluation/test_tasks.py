"""Files of questions: what form they are found to have, what is asked, what is right, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests_support import real_data

from qlora_sft.config import TaskConfig, task_name
from qlora_sft.errors import DataError
from qlora_sft.evaluation.tasks import Task, choice_question, read_tasks


def read(path: Path, rows: list[Any] | None = None, **options: Any) -> tuple[Task, list[str]]:
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    (task,) = read_tasks([TaskConfig(str(path), **options)], 0, said.append)
    return task, said


MMLU = {"question": "2 + 2?", "subject": "algebra", "choices": ["3", "4", "5", "22"], "answer": 1}
ARC = {
    "id": "MCAS_1",
    "question": "What falls?",
    "choices": {"text": ["snow", "light", "time"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
QUESTION = {"question": "Who?", "answer": "Nobody did."}


@pytest.mark.parametrize(
    ("row", "letter", "options"),
    [
        (MMLU, "B", 4),
        ({**MMLU, "answer": "C"}, "C", 4),
        ({**MMLU, "answer": "22"}, "D", 4),
        (ARC, "A", 3),
        ({**ARC, "answerKey": "3"}, "C", 3),
        ({"question": "2 + 2?", "options": ["3", "4"], "answer": "B", "answer_index": 1}, "B", 2),
        ({"question": "2 + 2?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B"}, "B", 4),
        ({"question": "Which blood?", "A": "O", "B": "A", "C": "B", "D": "AB", "answer": "B"}, "B", 4),
        ({**ARC, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}, "B", 2),
    ],
)
def test_the_right_choice_by_number_label_letter_or_text(row: dict[str, Any], letter: str, options: int) -> None:
    question, right, count = choice_question(row)
    assert (right, count) == (letter, options)
    assert question.startswith(row["question"])


def test_a_question_lists_its_choices_by_letter() -> None:
    assert choice_question(ARC)[0] == ("What falls?\n\nA. snow\nB. light\nC. time\n\nAnswer with the letter only.")


@pytest.mark.parametrize("answer", [4, -1, "E", "nothing", "7", True, 1.5])
def test_a_right_choice_that_is_none_is_refused(answer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: .*none of the 4 choices"):
        read(tmp_path / "t.jsonl", [{**MMLU, "answer": answer}])


@pytest.mark.parametrize(
    ("row", "form", "reference"),
    [
        (MMLU, "choices", "B"),
        (ARC, "choices", "A"),
        ({"question": "How many?", "answer": "2 * 9 = 18\n#### 18"}, "number", "18"),
        (QUESTION, "exact", "Nobody did."),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " y "}]}, "exact", "y"),
        ({"text": "Once upon a time."}, "loss", ""),
    ],
)
def test_the_form_is_detected_and_printed(row: dict[str, Any], form: str, reference: str, tmp_path: Path) -> None:
    task, said = read(tmp_path / "t.jsonl", [row] * 3)
    assert (task.form, task.items[2].reference) == (form, reference)
    assert task.items[2].place.endswith("t.jsonl:3")
    assert said == [f"t: detected {form}, 3 of 3 items"]


@pytest.mark.parametrize(
    "row", [{"question": "Who?", "options": ["a", "b"]}, {"question": "Who?", "answer": "A"}, {**MMLU, "answer": None}]
)
def test_a_choice_without_choices_or_answer_names_its_line(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:2: "):
        read(tmp_path / "t.jsonl", [MMLU, row], form="choices")


def test_an_answer_that_can_be_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    row = {"question": "Which blood?", "choices": ["O", "A", "B", "AB"], "answer": "B"}
    with pytest.raises(DataError, match=r"t\.jsonl:1: the answer 'B' is the letter of one choice"):
        read(tmp_path / "t.jsonl", [row])


def test_columns_that_are_not_asked_are_named(tmp_path: Path) -> None:
    _, said = read(tmp_path / "t.jsonl", [{"context": "Ann left.", "question": "Who?", "answer": "Ann"}])
    assert said[1] == f"t: not asked: column 'context' (first in {tmp_path / 't.jsonl'}:1)"


def test_names_tell_sets_of_one_repository_apart() -> None:
    names = ["a/b.jsonl", "allenai/ai2_arc:ARC-Easy[test]", "allenai/ai2_arc", "demo:held_out/fields.jsonl"]
    assert [task_name(TaskConfig(name)) for name in names] == ["b", "ai2_arc-ARC-Easy", "ai2_arc", "fields"]


def test_settings_without_effect_are_named(tmp_path: Path) -> None:
    """One command line may be for tasks of several forms."""
    _, said = read(tmp_path / "t.jsonl", [MMLU], samples=4, thinking="on")
    assert said == ["t: detected choices, 1 of 1 items; samples and thinking without effect"]


def test_the_answer_is_no_part_of_the_question(tmp_path: Path) -> None:
    task, _ = read(tmp_path / "t.jsonl", [QUESTION])
    assert task.items[0].conversation["messages"] == [{"role": "user", "content": "Who?"}]


def test_the_same_rows_are_drawn_for_the_same_seed(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(50)]
    one, said = read(tmp_path / "t.jsonl", rows, max_rows=7)
    two, _ = read(tmp_path / "t.jsonl", rows, max_rows=7)
    assert [item.place for item in one.items] == [item.place for item in two.items]
    assert len(one.items) == 7
    assert "7 of 50 items" in said[0]


def test_all_faults_of_all_files_come_at_once_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(MMLU) + "\n{\n" + json.dumps({**MMLU, "answer": 9}) + "\n")
    (tmp_path / "b.jsonl").write_text('{"nothing": 1}\n')
    tasks = [TaskConfig(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    with pytest.raises(DataError) as caught:
        read_tasks(tasks, 0, lambda _: None)
    text = str(caught.value)
    for expected in ("a.jsonl:2: not valid JSON", "a.jsonl:3: the answer 9", "b.jsonl:1: expected", "c.jsonl: no such"):
        assert expected in text


@pytest.mark.parametrize(
    ("row", "options", "fault"),
    [
        ({"text": "x"}, {"form": "exact"}, "a plain text has no question"),
        (QUESTION, {"form": "number"}, "holds no number; set form: exact"),
        ({"prompt": "def f():\n", "test": "t", "entry_point": "g"}, {}, "does not define the entry_point 'g'"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "",
             "tool_calls": [{"name": "f", "arguments": {}}]}]},
            {}, "a tool call, which no task grades",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_graded_is_refused(row: Any, options: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=fault):
        read(tmp_path / "t.jsonl", [row], **options)


def test_real_files_are_recognised() -> None:
    task, said = read(real_data("gsm8k_test.jsonl"))
    assert said == ["gsm8k_test: detected number, 1,319 of 1,319 items"]
    assert [item.reference for item in task.items[:3]] == ["18", "3", "70000"]
    code, said = read(real_data("HumanEval.jsonl"))
    assert said == ["HumanEval: detected code, 164 of 164 items"]
    assert code.items[0].tests
    assert code.items[0].tests.entry_point == "has_close_elements"
