"""Answers of finished evaluations: right ones become rows, and two runs are compared question by question."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import SourceConfig
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import ConfigError
from qlora_sft.evaluation.compare import EvaluationReport, TaskReport
from qlora_sft.evaluation.compare_runs import compare_runs, runs_table
from qlora_sft.evaluation.keep_right import check_target, keep_right


def evaluated(folder: Path, rows: Sequence[dict[str, Any]], form: Any = "number", **more: Any) -> EvaluationReport:
    """Writes results as `evaluate` leaves them in a run."""
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    answers = folder / "evaluation" / "sums.jsonl"
    answers.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    one = TaskReport(
        name="sums", form=form, path="sums.jsonl", questions="d", items=len(rows), seed=0, tuned={}, samples=2, **more
    )
    (folder / "evaluation" / "sums.json").write_text(json.dumps(one.to_json()))
    return EvaluationReport(
        str(folder), str(folder), [TaskReport.from_json({**one.to_json(), "answers": str(answers)})]
    )


def answered(number: int, right: Sequence[bool], **more: Any) -> dict[str, Any]:
    answers = [{"text": f"It is\u2028{number}.{k}", "right": good} for k, good in enumerate(right)]
    asked = {"messages": [{"role": "user", "content": f"q{number}"}]}
    return {"conversation": asked, "tuned": {"answers": answers, "right": sum(right)}, **more}


def test_right_answers_become_rows_that_are_read_again(tmp_path: Path) -> None:
    rows = [answered(0, [True, False]), answered(1, [False, False]), answered(2, [True, True], in_thought=True)]
    rows[2]["tuned"]["answers"] = [{"text": "hm</think>\n\n4", "right": True}] * 2
    rows[0]["conversation"]["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    file = tmp_path / "kept.jsonl"
    assert keep_right(evaluated(tmp_path / "run", rows), file) == (2, 3)
    kept = [json.loads(line) for line in file.open(encoding="utf-8")]
    assert kept[0]["messages"][-1] == {"role": "assistant", "content": "It is\u20280.0"}
    assert kept[0]["tools"] == rows[0]["conversation"]["tools"]
    assert kept[1]["messages"][-1]["content"] == "<think>hm</think>\n\n4"
    (source,) = read_sources([SourceConfig(str(file))], 0)
    read = list(source.rows)
    assert [row["messages"][0]["content"] for row in read] == ["q0", "q2"]
    assert read[1]["messages"][-1]["reasoning"] == "hm"


def test_an_answer_that_was_cut_off_is_no_row_and_examples_are_no_part_of_one(tmp_path: Path) -> None:
    cut, shown = answered(0, [True, True]), answered(1, [True], shown=2)
    cut["tuned"]["answers"][0]["cut_off"] = True
    own = shown["conversation"]["messages"]
    example = [{"role": "user", "content": "q9"}, {"role": "assistant", "content": "a9"}]
    shown["conversation"]["messages"] = [{"role": "system", "content": "S"}, *example, *own]
    file = tmp_path / "kept.jsonl"
    assert keep_right(evaluated(tmp_path / "run", [cut, shown]), file) == (2, 2)
    kept = [[message["content"] for message in json.loads(line)["messages"]] for line in file.open(encoding="utf-8")]
    assert kept == [["q0", "It is\u20280.1"], ["S", "q1", "It is\u20281.0"]]


def test_a_file_that_cannot_be_written_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("mine")
    for file in (tmp_path, tmp_path / "missing" / "kept.jsonl", questions):
        with pytest.raises(ConfigError, match="--keep-right"):
            check_target(file)


def test_two_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", [answered(i, [False, i % 4 == 0]) for i in range(40)])
    evaluated(tmp_path / "b", [answered(i, [True, i % 4 == 0]) for i in range(40)])
    (task,) = compare_runs(tmp_path / "a", tmp_path / "b").tasks
    assert (task.first, task.second) == (pytest.approx(0.125), pytest.approx(0.625))
    assert task.verdict == "better"
    assert compare_runs(tmp_path / "b", tmp_path / "a").tasks[0].verdict == "worse"
    same = compare_runs(tmp_path / "a", tmp_path / "a")
    assert same.tasks[0].verdict == "no difference shown"
    assert "no difference shown" in runs_table(same)


def test_a_lower_loss_is_better_and_long_texts_weigh_more(tmp_path: Path) -> None:
    def texts(shift: float) -> list[dict[str, Any]]:
        return [{"tuned": {"loss": 2.0 + 0.1 * (i % 3) + shift * (1 + i % 2), "weight": 10.0 + i}} for i in range(30)]

    evaluated(tmp_path / "a", texts(0.0), "loss")
    evaluated(tmp_path / "b", texts(-0.2), "loss")
    (task,) = compare_runs(tmp_path / "a", tmp_path / "b").tasks
    assert task.verdict == "better"
    weights = [10.0 + i for i in range(30)]
    moved = sum(w * -0.2 * (1 + i % 2) for i, w in enumerate(weights)) / sum(weights)
    assert task.change.difference == pytest.approx(moved)


def test_a_loss_over_other_tokens_is_not_compared(tmp_path: Path) -> None:
    for name, weight in (("a", 10.0), ("b", 12.0)):
        evaluated(tmp_path / name, [{"tuned": {"loss": 2.0 + weight / 100, "weight": weight}}] * 30, "loss")
    with pytest.raises(ConfigError, match="a loss compares only between models of one tokenizer"):
        compare_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("name", "text"), [("sums.json", "[]"), ("sums.json", "{"), ("sums.json", "{}"),
                                            ("sums.jsonl", '{"tuned": {}}\n'), ("sums.jsonl", "[1]\n"),
                                            ("sums.jsonl", ""),
                                            ("sums.jsonl", '{"tuned": {"answers": [], "right": 0}}\n')])  # fmt: skip
def test_damaged_results_are_named(tmp_path: Path, name: str, text: str) -> None:
    evaluated(tmp_path / "a", [answered(0, [True])])
    (tmp_path / "a" / "evaluation" / "diagnosis.json").write_text('{"verdict": "better"}')
    assert len(compare_runs(tmp_path / "a", tmp_path / "a").tasks) == 1
    (tmp_path / "a" / "evaluation" / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name}.*run evaluate once more"):
        compare_runs(tmp_path / "a", tmp_path / "a")


def test_runs_without_a_common_task_are_told_apart(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", [answered(0, [True])])
    evaluated(tmp_path / "b", [answered(0, [True])], max_new_tokens=9)
    with pytest.raises(ConfigError, match="no task was asked of both in the same way"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "evaluation")
    with pytest.raises(ConfigError, match="has no results to compare; run qlora-sft evaluate"):
        compare_runs(tmp_path / "a", tmp_path / "b")
