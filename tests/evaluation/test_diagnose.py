"""What all tasks together say of a model, and the tools around it: examples, refusals, outlook, right answers kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.config import SourceConfig, TaskConfig
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.evaluation.ask import grade_all, repetition
from qlora_sft.evaluation.benign import BENIGN, refuses
from qlora_sft.evaluation.compare import EvaluationReport, MetricChange, TaskReport, _digest
from qlora_sft.evaluation.compare_runs import compare_runs, runs_table
from qlora_sft.evaluation.diagnose import diagnosed, in_other_ways
from qlora_sft.evaluation.keep_right import check_target, keep_right
from qlora_sft.evaluation.outlook import questions_needed, rl_outlook, wilson
from qlora_sft.evaluation.tasks import read_tasks


def quiet(text: str) -> None:
    """Says nothing."""


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------ refusals

REFUSING = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, I can\u2019t assist with this request.",
    "I cannot provide instructions for that.",
    "Sorry, I can't.",
    "I am unable to answer this question.",
    "I must decline.",
    "As an AI language model, I cannot do that.",
    "Unfortunately, I am not able to give you such advice.",
    "I won't be able to help you here.",
    "This request is inappropriate.",
    "I do not feel comfortable answering that.",
    "",
]
ANSWERING = [
    "You can kill a process with `kill -9 PID`.",
    "I can't believe how easy this is: whip it for five minutes.",
    "Lisbon.",
    "Sorry to hear that! Try chamomile tea and no screens before bed.",
    "If you can't help with the lifting, hold the ladder.",
    "I'm glad you asked. Boil them for 20 minutes; they cannot be overcooked easily.",
    "A variable that cannot be changed is called a constant.",
    "No. A virus is not a bacterium.",
    "I would not use bleach on silk, but on cotton it is fine.",
    "As an AI fan, I love this question. Start with a plan.",
]


@pytest.mark.parametrize("answer", REFUSING)
def test_a_refusal_is_recognised(answer: str) -> None:
    assert refuses(answer)


@pytest.mark.parametrize("answer", ANSWERING)
def test_an_answer_is_no_refusal(answer: str) -> None:
    assert not refuses(answer)


def test_the_shipped_questions_are_asked_as_questions() -> None:
    (task,) = read_tasks([TaskConfig("benign")], 0, quiet)
    assert task.form == "refusal"
    assert len(task.items) == len({item.conversation["messages"][0]["content"] for item in task.items}) >= 50
    assert BENIGN.is_file()


# ------------------------------------------------------------------ the same in other ways

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


# ------------------------------------------------------------------ the conclusion


def report(
    name: str, form: Any, base: float, tuned: float, verdict: str, again: str | None = None, shots: int | None = None
) -> TaskReport:
    metric = {"loss": "loss", "refusal": "refused", "choices": "accuracy"}.get(form, "pass@1")
    moved = tuned - base
    return TaskReport(
        name=name, form=form, path=f"{name}.jsonl", questions="x", items=40, seed=0, base={metric: base},
        tuned={metric: tuned}, change={metric: MetricChange(difference=moved, interval=[moved - 0.01, moved + 0.01])},
        verdict=verdict, reason="", asks_again=again, shots=shots, phrasing=None if shots or not again else "polite",
        differing=9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reports", "verdict", "sign"),
    [
        (  # examples bring it back
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.6, 0.59, "no difference shown", "sums", 4),
             report("sums-polite", "number", 0.6, 0.2, "worse", "sums")],
            "alignment tax", "the answers are back with 4 examples (pass@1 60.0% to 59.0%)",
        ),
        (  # nothing does
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.6, 0.1, "worse", "sums", 4)],
            "forgetting", "pass@1 60.0% to 20.0%, and with 4 examples (pass@1 60.0% to 10.0%) as well",
        ),
        (  # nor that in other words the base has nothing to lose
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.6, 0.1, "worse", "sums", 4),
             report("sums-polite", "number", 0.0, 0.0, "no difference shown", "sums")],
            "forgetting", "and with 4 examples (pass@1 60.0% to 10.0%) as well",
        ),
        (  # nor that the base cannot follow examples
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.0, 0.0, "no difference shown", "sums", 4),
             report("sums-polite", "number", 0.5, 0.1, "worse", "sums")],
            "forgetting", "and in other words (polite) (pass@1 50.0% to 10.0%) as well",
        ),
        ([report("sums", "number", 0.6, 0.2, "forgetting")], "forgetting", "pass@1 60.0% to 20.0%"),
        ([report("sums", "number", 0.6, 0.2, "worse")], "worse", "sums: worse"),
        ([report("benign", "refusal", 0.02, 0.6, "worse")], "refusals", "refused 2.0% to 60.0%"),
        ([report("wiki", "loss", 3.0, 3.4, "worse")], "forgetting", "loss 3.000 to 3.400"),
        ([report("sums", "number", 0.2, 0.6, "better"), report("wiki", "loss", 3.0, 3.01, "no difference shown")],
         "better", "sums: better"),
        ([report("wiki", "loss", 3.0, 3.01, "no difference shown")], "no difference shown", None),
        # Surely higher, and by less than any training brings about.
        ([report("wiki", "loss", 3.0, 3.02, "worse")], "no difference shown", None),
        (  # behind examples both fail, which brings nothing back
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.0, 0.0, "no difference shown", "sums", 4)],
            "worse", "whether it comes back is open with 4 examples (pass@1 0.0% to 0.0%)",
        ),
        (  # as few questions show no difference, and no return either
            [report("sums", "number", 0.6, 0.2, "worse"),
             replace(report("sums-4-shot", "number", 0.6, 0.45, "no difference shown", "sums", 4),
                     change={"pass@1": MetricChange(difference=-0.15, interval=[-0.45, 0.1])})],
            "worse", "is open with 4 examples (pass@1 60.0% to 45.0%)",
        ),
        (  # a loss of one ability is said before a gain of another
            [report("sums", "number", 0.2, 0.6, "better"), report("wiki", "loss", 3.0, 3.4, "worse")],
            "forgetting", "wiki: forgetting",
        ),
    ],
)  # fmt: skip
def test_the_conclusion_follows_the_signs(reports: list[TaskReport], verdict: str, sign: str | None) -> None:
    found = diagnosed(reports)
    assert found is not None
    assert found.verdict == verdict
    assert sign is None or any(sign in each for each in found.signs), found.signs
    assert (found.cure is None) == (verdict in ("better", "no difference shown"))


def test_what_was_cut_off_is_not_forgotten() -> None:
    """A model that has learned to write down its steps needs more tokens than its base."""
    plain = report("sums", "number", 0.6, 0.2, "worse")
    shots = report("sums-4-shot", "number", 0.6, 0.1, "worse", "sums", 4)
    moved = {"ended": (-0.5, -0.6, -0.4), "repetition": (0.0, -0.01, 0.01)}

    def cut(repeated: float) -> TaskReport:
        changes = {name: MetricChange(difference=d + repeated, interval=[low + repeated, high + repeated])
                   for name, (d, low, high) in moved.items()}  # fmt: skip
        return replace(plain, base={**(plain.base or {}), "ended": 1.0}, tuned={**plain.tuned, "ended": 0.5},
                       change={**(plain.change or {}), **changes}, max_new_tokens=64)  # fmt: skip

    found = diagnosed([cut(0.0), shots])
    assert found is not None
    assert found.verdict == "worse"
    assert "50% of its answers were cut off at 64 tokens" in found.signs[0]
    # One that goes in circles would not come to an end with more tokens either.
    assert diagnosed([cut(0.3), shots]).verdict == "forgetting"  # type: ignore[union-attr]


def test_a_thought_that_was_cut_off_is_no_refusal() -> None:
    (task,) = read_tasks([TaskConfig("benign", max_rows=4)], 0, quiet)
    texts = ["<think>The user asks", "<think>hm</think>", "<think>hm</think>I cannot help with that.", ""]
    assert [good for good, _, _ in grade_all(task, [False] * 4, texts)] == [True, False, False, False]


def test_an_adapter_that_changes_nothing_is_named() -> None:
    still = MetricChange(difference=0.0, interval=[0.0, 0.0])
    same = TaskReport(
        name="a", form="number", path="a", questions="x", items=9, seed=0, base={"pass@1": 0.5}, tuned={"pass@1": 0.5},
        change={"pass@1": still}, verdict="no difference shown", reason="", differing=0,
    )  # fmt: skip
    found = diagnosed([same])
    assert found is not None
    assert found.verdict == "idle adapter"
    # As many are right as before, and the answers are others: the adapter does something.
    assert diagnosed([replace(same, differing=3)]).verdict == "no difference shown"  # type: ignore[union-attr]
    letters = replace(same, form="choices", base={"accuracy": 0.5}, tuned={"accuracy": 0.5}, change={"accuracy": still})
    assert diagnosed([letters]).verdict == "no difference shown"  # type: ignore[union-attr]
    assert diagnosed([report("b", "number", 0.1, 0.1, "better")]).verdict == "better"  # type: ignore[union-attr]
    alone = TaskReport(name="a", form="number", path="a", questions="x", items=9, seed=0, tuned={"pass@1": 0.5})
    assert diagnosed([alone]) is None


# ------------------------------------------------------------------ the outlook of RL


def test_what_rl_can_expect() -> None:
    assert rl_outlook(0.0, 0.0, 8, 200).startswith("RL will likely fail: pass@1 is 0.0%")
    assert rl_outlook(0.10, 0.12, 8, 500).startswith("RL will struggle: pass@8 is 12.0%")
    assert rl_outlook(0.3, 0.7, 8, 200).startswith("RL has enough right answers")
    open_ = rl_outlook(0.04, 0.3, 8, 50)
    assert open_.startswith("whether RL can work is open with 50 questions")
    assert "about" in open_


@given(st.floats(0, 1), st.integers(1, 5000))
def test_an_interval_holds_its_share(share: float, count: int) -> None:
    low, high = wilson(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert wilson(share, 4 * count)[1] - wilson(share, 4 * count)[0] <= high - low + 1e-12


def test_as_many_questions_as_are_named_do_tell() -> None:
    for share, threshold in ((0.02, 0.05), (0.04, 0.05), (0.3, 0.2), (0.21, 0.2)):
        needed = questions_needed(share, threshold)
        low, high = wilson(share, needed)
        assert high < threshold or low >= threshold
        low, high = wilson(share, needed // 2)
        assert low < threshold <= high or needed <= 10
    assert questions_needed(0.05, 0.05 + 1e-9) == 100_000


def test_going_in_circles_is_repetition() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7, 8] * 50) > 0.9
    assert repetition([1, 2]) == 0


# ------------------------------------------------------------------ right answers, two runs


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


def test_more_tests_of_the_same_problems_are_other_questions(tmp_path: Path) -> None:
    def digest(test: str) -> str:
        row = {"prompt": "def f(x):\n", "test": f"def check(c):\n    {test}\n", "entry_point": "f"}
        (task,) = read_tasks([TaskConfig(write(tmp_path / "code.jsonl", [row]))], 0, quiet)
        return _digest(task)

    assert digest("pass") == digest("pass") != digest("assert c(1) == 2")


def test_runs_without_a_common_task_are_told_apart(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", [answered(0, [True])])
    evaluated(tmp_path / "b", [answered(0, [True])], max_new_tokens=9)
    with pytest.raises(ConfigError, match="no task was asked of both in the same way"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "evaluation")
    with pytest.raises(ConfigError, match="has no results to compare; run qlora-sft evaluate"):
        compare_runs(tmp_path / "a", tmp_path / "b")
