"""Refusals are told from answers, and the shipped questions that nobody should refuse are asked."""

from __future__ import annotations

import pytest

from qlora_sft.config import TaskConfig
from qlora_sft.evaluation.ask import grade_all
from qlora_sft.evaluation.benign import BENIGN, refuses
from qlora_sft.evaluation.tasks import read_tasks


def quiet(text: str) -> None:
    """Says nothing."""


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


def test_a_thought_that_was_cut_off_is_no_refusal() -> None:
    (task,) = read_tasks([TaskConfig("benign", max_rows=4)], 0, quiet)
    texts = ["<think>The user asks", "<think>hm</think>", "<think>hm</think>I cannot help with that.", ""]
    assert [good for good, _, _ in grade_all(task, [False] * 4, texts)] == [True, False, False, False]
