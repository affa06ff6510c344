"""Every form of row: what it becomes, and what is said when it cannot."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.data.formats import RowForm, convert, detect
from qlora_sft.errors import DataError


def read(row: dict[str, Any], columns: dict[str, str] | None = None) -> dict[str, Any]:
    """The conversation of a row in whatever form it has; fails if anything of it went unused."""
    form = detect(row, columns)
    assert form is not None
    unused: set[str] = set()
    conversation = convert(row, form, unused)
    assert not unused
    return conversation


def messages_of(row: dict[str, Any], columns: dict[str, str] | None = None) -> list[dict[str, Any]]:
    return read(row, columns)["messages"]


def call(name: str, arguments: dict[str, Any], **more: str) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


# ------------------------------------------------------------------ the forms


def test_openai_messages_with_calls_results_and_old_names() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call("f", {"x": 1}, id="c1")], "refusal": None},
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
            {"role": "assistant", "content": "seven", "reasoning_content": "it said 7", "weight": 0.5},
            {"role": "assistant", "content": "", "function_call": {"name": "g", "arguments": '{"y": [2]}'}},
            {"role": "function", "name": "g", "content": {"temp": 21, "unit": "°C"}},
            {"role": "assistant", "content": "done", "train": False},
        ],
        "tools": json.dumps([{"name": "f", "parameters": {}}, {"type": "function", "function": {"name": "g"}}]),
    }
    conversation = read(row)
    assert conversation["messages"] == [
        {"role": "system", "content": "be brief"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call("f", {"x": 1}, id="c1")]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": "seven", "reasoning": "it said 7", "weight": 0.5},
        {"role": "assistant", "content": "", "tool_calls": [call("g", {"y": [2]})]},
        {"role": "tool", "name": "g", "content": '{"temp": 21, "unit": "°C"}'},
        {"role": "assistant", "content": "done", "train": False},
    ]
    names = [tool["function"]["name"] for tool in conversation["tools"]]
    assert names == ["f", "g"]


def test_typed_parts_of_several_dialects() -> None:
    turns = messages_of(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "look "}, {"type": "text", "text": "here"}]},
                {
                    "role": "assistant",
                    "loss_weight": 0.25,
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "text", "value": "I ask."},
                        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                        {"type": "tool_use", "id": "t", "name": "g", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t", "content": {"r": 2}},
                        {"type": "tool_result", "content": "7"},
                        "and now?",
                    ],
                },
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}, "a"]},
            ]
        }
    )
    assert turns == [
        {"role": "user", "content": "look here"},
        {
            "role": "assistant",
            "content": "I ask.",
            "reasoning": "hm",
            "tool_calls": [call("f", {"x": 1}), call("g", {}, id="t")],
            "weight": 0.25,
        },
        {"role": "tool", "content": "7"},
        {"role": "tool", "content": '{"r": 2}', "tool_call_id": "t"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "a", "reasoning": "so"},
    ]


def test_sharegpt_with_system_tools_calls_and_observations() -> None:
    row = {
        "system": "be kind",
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "let me see"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": "1"}}'},
            {"from": "observation", "value": "r"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'},
            {"from": "observation", "value": "s"},
            {"from": "gpt", "value": "a", "weight": 0},
        ],
    }
    assert messages_of(row) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "let me see", "tool_calls": [call("f", {"x": "1"})]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "", "tool_calls": [call("f", {}), call("g", {})]},
        {"role": "tool", "content": "s"},
        {"role": "assistant", "content": "a", "weight": 0},
    ]


def test_the_turns_decide_between_messages_and_sharegpt_not_the_column() -> None:
    assert messages_of({"conversations": [USER, ANSWER]}) == [USER, ANSWER]
    assert messages_of({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}) == [USER, ANSWER]
    assert messages_of({"messages": json.dumps([USER, ANSWER])}) == [USER, ANSWER]
    assert messages_of({"dialogue": [USER, ANSWER]}, {"messages": "dialogue"}) == [USER, ANSWER]


def test_alpaca_with_and_without_input_history_and_system() -> None:
    row = {"instruction": "Sum", "input": "", "output": "a"}
    assert messages_of(row) == [{"role": "user", "content": "Sum"}, ANSWER]
    row = {"instruction": "Sum", "input": "1 2", "output": "3", "history": [["q", "a"]], "system": "s"}
    assert messages_of(row) == [
        {"role": "system", "content": "s"},
        USER,
        ANSWER,
        {"role": "user", "content": "Sum\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]


def test_pairs_under_any_name_and_as_lists_of_messages() -> None:
    assert messages_of({"prompt": "q", "completion": "a"}) == [USER, ANSWER]
    assert messages_of({"question": "q", "answer": "a"}) == [USER, ANSWER]
    columns = {"prompt": "frage", "completion": "antwort"}
    assert messages_of({"frage": "q", "antwort": "a"}, columns) == [USER, ANSWER]
    earlier = [USER, ANSWER, {"role": "user", "content": "more"}]
    assert messages_of({"prompt": earlier, "completion": [{"role": "assistant", "content": "b"}]}) == [
        USER,
        {**ANSWER, "train": False},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "b"},
    ]


def test_thinking_in_the_text_becomes_reasoning_and_only_at_the_beginning_of_an_answer() -> None:
    def answer(content: str) -> dict[str, Any]:
        return messages_of({"prompt": "<think>no</think>", "completion": content})[1]

    assert answer("<think>\nwhy\n</think>\n\nbecause") == {
        "role": "assistant",
        "content": "because",
        "reasoning": "why",
    }
    assert answer("<think>\n\n</think>\n\nbecause") == {"role": "assistant", "content": "because"}
    quoted = "The tag <think>x</think> is special"
    assert answer(quoted) == {"role": "assistant", "content": quoted}
    assert messages_of({"prompt": "<think>no</think>", "completion": "a"})[0]["content"] == "<think>no</think>"


def test_plain_text_stays_as_it_is() -> None:
    assert read({"text": "  two\n\nparts "}) == {"text": "  two\n\nparts "}


def test_what_is_not_used_is_told() -> None:
    unused: set[str] = set()
    row = {
        "messages": [{**USER, "image": "at x", "name": "Bo", "audio": None}, {**ANSWER, "citations": "[1]"}],
        "rejected": "b",
        "score": None,
    }
    form = detect(row)
    assert form is not None
    convert(row, form, unused)
    assert unused == {"message key 'image'", "message key 'citations'", "column 'rejected'"}


# ------------------------------------------------------------------ properties

TEXT = st.text(min_size=1).filter(lambda text: text.strip() and not text.lstrip().startswith("<think>"))


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_every_form_gives_the_same_texts_back(turns: list[tuple[str, str]]) -> None:
    expected = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    parts = [{**m, "content": [{"type": "text", "value": m["content"]}]} for m in expected]
    speakers = {"user": "human", "assistant": "gpt"}
    talk = [{"from": speakers[m["role"]], "value": m["content"]} for m in expected]
    question, answer = turns[-1]
    history = [list(pair) for pair in turns[:-1]]
    assert messages_of({"messages": expected}) == expected
    assert messages_of({"messages": parts}) == expected
    assert messages_of({"conversations": talk}) == expected
    assert messages_of({"instruction": question, "output": answer, "history": history}) == expected
    assert messages_of({"prompt": question, "completion": answer}) == expected[-2:]


@given(TEXT, TEXT.map(lambda text: text.strip("\n")).filter(lambda text: "</think>" not in text))
def test_reasoning_survives_however_it_is_written(text: str, thought: str) -> None:
    text = text.lstrip("\n")
    expected = [USER, {"role": "assistant", "content": text, "reasoning": thought}]
    typed = [{"type": "reasoning", "value": thought}, {"type": "text", "value": text}]
    for answer in (
        {"content": text, "reasoning": thought},
        {"content": text, "reasoning_content": thought},
        {"content": f"<think>\n{thought}\n</think>\n\n{text}"},
        {"content": typed},
    ):
        assert messages_of({"messages": [USER, {"role": "assistant", **answer}]}) == expected


# ------------------------------------------------------------------ faults


def fault(row: dict[str, Any], form: RowForm | None = None) -> str:
    form = form or detect(row)
    assert form is not None
    with pytest.raises(DataError) as caught:
        convert(row, form, set())
    return str(caught.value)


def chat(**last: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **last}]}


FAULTS = [
    ({"messages": []}, "at least one message"),
    ({"messages": ["hi"]}, "message 0: expected an object with 'role'"),
    ({"messages": [USER]}, "no assistant turn"),
    ({"messages": [USER, {"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
    ({"messages": [USER, {"role": "gpt", "content": "x"}]}, "use one of system, user, assistant, tool"),
    ({"messages": [{**USER, "tool_calls": [call("f", {})]}, ANSWER]}, "only an assistant may have tool_calls"),
    ({"messages": [{**USER, "reasoning": "r"}, ANSWER]}, "only an assistant may have reasoning"),
    (chat(content=""), "message 1: an assistant turn with neither content nor tool_calls"),
    (chat(content=5), "'content' must be a text or a list of typed parts, got a number"),
    (chat(content="x", weight=-1), "must not be negative"),
    (chat(content="x", weight=float("nan")), "must not be negative or infinite"),
    (chat(content="x", train="no"), "'train' has the wrong type"),
    (chat(content="<think>never closed"), "never closes it"),
    (chat(content="<think>a</think>b", reasoning="c"), "given twice, by key 'reasoning' and <think> text"),
    (chat(content="", tool_calls=[{"name": "f", "arguments": "{"}]), "arguments of 'f': the text is not valid JSON"),
    (chat(content="", tool_calls=[{"name": "f", "arguments": "[1]"}]), "must be an object or JSON text of one"),
    (chat(content="", tool_calls=[{"function": {}}]), "needs a function with a 'name'"),
    (chat(content="", tool_calls=[]), "neither content nor tool_calls"),
    (chat(content="", tool_calls="f"), "'tool_calls' is not valid JSON"),
    (chat(content="", tool_calls=5), "'tool_calls' must be a list of calls, got a number"),
    (chat(content=[{"type": "image", "url": "x"}]), "a content part of type 'image': only text is trained here"),
    (chat(content=[{"type": "input_audio", "data": "x"}]), "part of type 'input_audio': only text is trained here"),
    (chat(content=[{"type": "file", "url": "x"}]), "a content part of type 'file' cannot be trained on"),
    ({**chat(content="x"), "images": ["a.png"]}, "column 'images': only text is trained here"),
    ({**chat(content="x"), "image": {"bytes": b"1", "path": None}}, "column 'image': only text is trained here"),
    ({**chat(content="x"), "videos": '["a.mp4"]'}, "column 'videos': only text is trained here"),
    (chat(content="x", images=["a.png"]), "message key 'images': only text is trained here"),
    (chat(content=[{"type": "text"}]), "needs a text under 'value'"),
    (chat(content=[{"type": "text", "value": "x"}, {"type": "reasoning", "value": "r"}]), "a template writes it first"),
    ({**chat(content="x"), "tools": {}, "system": 5}, "system column must hold a text"),
    ({**chat(content="x"), "tools": "[{"}, "'tools' is not valid JSON"),
    ({**chat(content="x"), "tools": [{"f": 1}]}, "each of 'tools' needs a function with a 'name'"),
    ({**chat(content="x"), "tools": {"name": "f"}}, "'tools' must be a list"),
    ({**chat(content="x"), "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be a dict"),
    ({"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ANSWER]}, "keep one"),
    ({"conversations": [{"from": "bob", "value": "x"}]}, "turn 0: unknown speaker 'bob'; use one of human"),
    ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "the function call is not valid JSON"),
    ({"instruction": "", "input": "", "output": "x"}, "'instruction' is empty"),
    ({"instruction": "x", "output": "y", "history": ["q"]}, "[question, answer] pairs"),
    ({"prompt": " ", "completion": "x"}, "'prompt' is empty"),
    ({"question": "x", "answer": ""}, "'answer': an assistant turn with neither content"),
    ({"text": " "}, "'text' must be a text, got an empty one"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_faults_name_the_cause(row: dict[str, Any], message: str) -> None:
    assert message in fault(row)


def test_a_form_that_was_asked_for_says_what_it_needs() -> None:
    text = fault({"question": "q", "answer": "a"}, RowForm("prompt_completion", {"prompt": "question"}))
    assert "needs 'completion', found 'question', 'answer'" in text
