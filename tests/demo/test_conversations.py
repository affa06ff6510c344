import json
from typing import Any

import pytest

from qlora_sft.data.render import render_conversation
from qlora_sft.demo.conversations import SOURCES, data_path, generate


def user_texts(rows: list[dict[str, Any]]) -> list[str]:
    return [next(m["content"] for m in row["messages"] if m["role"] == "user") for row in rows]


@pytest.mark.parametrize("source", list(SOURCES))
def test_it_is_the_same_every_time_and_no_question_is_in_both_splits(source: str) -> None:
    train, held_out = generate(source)
    assert (train, held_out) == generate(source)
    questions = user_texts(train) + user_texts(held_out)
    assert len(set(questions)) == len(questions)


def test_there_is_enough_of_it() -> None:
    splits = [generate(source) for source in SOURCES]
    assert sum(len(train) for train, _ in splits) >= 2000
    assert sum(len(held_out) for _, held_out in splits) >= 200


def test_the_files_hold_what_is_generated() -> None:
    for source in SOURCES:
        rows = [json.loads(line) for line in (data_path() / "train" / f"{source}.jsonl").read_text().splitlines()]
        assert rows == generate(source)[0]


def test_answers_are_right(tokenizer: Any) -> None:
    for row in generate("fields")[0]:
        answer = json.loads(row["messages"][1]["content"])
        assert len(answer) == 4
        assert all(str(value) in row["messages"][0]["content"] for value in answer.values())
    modes = set()
    for row in generate("arithmetic")[0]:
        thinking = row["chat_template_kwargs"]["enable_thinking"]
        assert thinking == ("reasoning" in row["messages"][1])
        modes.add(thinking)
        if thinking:
            step, result = row["messages"][1]["reasoning"].split(" = ")
            assert eval(step) == int(result)
            assert row["messages"][1]["content"] == f"The answer is {result}."
    assert modes == {True, False}
    for row in generate("tools")[0]:
        call = row["messages"][1]["tool_calls"][0]["function"]
        offered = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in row["tools"]}
        assert set(call["arguments"]) == set(offered[call["name"]])
        rendered = render_conversation(row, tokenizer)
        result_ids = tokenizer(row["messages"][2]["content"])["input_ids"]
        masked = [i for i, w in zip(rendered.input_ids, rendered.weights, strict=True) if w == 0]
        assert any(masked[k : k + len(result_ids)] == result_ids for k in range(len(masked)))
