"""Every tool result is rendered with its call, in the order of the calls, or the row is refused: never swapped."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_sft.data.formats import RowForm, convert
from qlora_sft.data.render import render_conversation
from qlora_sft.data.shipped import FOLDER as TEMPLATES
from qlora_sft.data.tool_turns import paired
from qlora_sft.errors import DataError

Row = dict[str, Any]


def call(word: str, name: str, identity: Any = None) -> Row:
    function = {"name": name, "arguments": {"what": f"ask{word}"}}
    return {"type": "function", "function": function, **({} if identity is None else {"id": identity})}


@st.composite
def chats(draw: st.DrawFn, styles: list[str]) -> tuple[Row, bool]:
    """(messages with calls and results, whether anybody can tell which result belongs to which call).

    A call asks for ``askX`` and its result is ``gotX``, with the same X and no other.
    """
    messages: list[Row] = []
    style = draw(st.sampled_from(styles))
    clear = True
    for turn in range(draw(st.integers(1, 3))):
        words = [f"{turn}{number}" for number in range(draw(st.integers(1, 3)))]
        names = draw(st.lists(st.sampled_from(["look", "seek", "find"]), min_size=len(words), max_size=len(words)))
        identities = {
            "ids": [f"call{word}xxx" for word in words],
            "short ids": [f"c{number}" for number in range(len(words))],  # the same in every turn
            "numbers": list(range(len(words))),
        }.get(style, [None] * len(words))
        calls = [call(*each) for each in zip(words, names, identities, strict=True)]
        results = [
            {
                "role": "tool",
                "content": f"got{word}",
                **({} if identity is None else {"tool_call_id": identity}),
                **({"name": name} if style == "names" else {}),
            }
            for word, name, identity in zip(words, names, identities, strict=True)
        ]
        change = draw(st.sampled_from(["none", "order", "order", "missing", "twice", "unknown", "split"]))
        if change == "order" and style != "nothing":
            order = draw(st.permutations(range(len(results))))
            # Of calls of one name, results that say no more are in their order.
            of_name = {name: iter([n for n in range(len(names)) if names[n] == name]) for name in names}
            order = [next(of_name[names[n]]) for n in order] if style == "names" else order
            results = [results[number] for number in order]
        if change == "missing":
            del results[draw(st.integers(0, len(results) - 1))]
        if change == "twice":
            results.append(copy.deepcopy(draw(st.sampled_from(results))))
        if change == "unknown":
            results[0]["tool_call_id"] = "nobody"
        clear = clear and change in ("none", "order", "split")
        messages.append({"role": "user", "content": "question"})
        parts = [calls[:1], calls[1:]] if change == "split" and len(calls) > 1 else [calls]
        messages += [{"role": "assistant", "content": "", "tool_calls": part} for part in parts]
        messages += results
        messages.append({"role": "assistant", "content": "answer"})
    return {"messages": messages}, clear


@pytest.mark.parametrize("template", ["chatml-think", "qwen3", "mistral"])
@pytest.mark.parametrize("through", ["file", "directly"])
def test_results_are_with_their_calls_or_the_row_is_refused(template: str, through: str, tokenizer: Any) -> None:
    """``through``: as a row of a file, where ids may be numbers, or as a conversation."""
    accepted = [0, 0]
    written = copy.deepcopy(tokenizer)
    written.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    styles = ["ids", "short ids", "names", "nothing", *(["numbers"] if through == "file" else [])]

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(chat=chats(styles))
    def run(chat: tuple[Row, bool]) -> None:
        row, clear = chat
        try:
            conversation = convert(row, RowForm("messages"), set()) if through == "file" else row
            text = written.decode(render_conversation(conversation, written).input_ids)
        except DataError:
            assert not clear, row
            return
        accepted[clear] += 1
        asked, got = re.findall(r"ask(\d+)", text), re.findall(r"got(\d+)", text)
        if clear:
            assert got == asked
        # Where something is missing, a whole turn is: what is there is in order and complete.
        turns = {word[0]: [each for each in asked if each[0] == word[0]] for word in got}
        assert got == [word for turn in turns.values() for word in turn]
        if template == "mistral":
            ids = dict(re.findall(r'ask(\d+)"}, "id": "(\w{9})"', text))
            assert dict(re.findall(r'"content": got(\d+), "call_id": "(\w{9})"', text)) == {w: ids[w] for w in got}

    run()
    assert accepted[True] >= 30


def messages(calls: list[Row], results: list[Row]) -> list[Row]:
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", **result} for result in results),
        {"role": "assistant", "content": "a"},
    ]


W, T = call("w", "weather", "cw"), call("t", "time", "ct")
FAULTS = [
    ([W], [{"content": "x", "tool_call_id": "other"}], "message 2: a tool result for the call 'other', but the calls"),
    ([W, T], [{"content": "x", "tool_call_id": "ct"}], "the call of 'weather' has no result"),
    ([W, T], [{"content": "x"}], "the call of 'time' has no result"),
    ([W], [{"content": "x", "tool_call_id": "cw"}] * 2, "for the call 'cw' too many"),
    ([W], [{"content": "x"}] * 2, "a tool result too many"),
    ([W], [{"content": "x", "name": "time"}], "a tool result of 'time' too many: there is no such call"),
    ([W, W], [{"content": "x", "tool_call_id": "cw"}] * 2, "2 calls of one turn have the id 'cw'"),
]


@pytest.mark.parametrize(("calls", "results", "message"), FAULTS, ids=[message for *_, message in FAULTS])
def test_what_cannot_be_paired_is_refused(calls: list[Row], results: list[Row], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        paired(messages(calls, results), set())


def test_results_get_the_id_of_their_call_and_its_place() -> None:
    for results in (
        [{"content": "1"}, {"content": "2"}],
        [{"content": "2", "tool_call_id": "ct"}, {"content": "1"}],
        [{"content": "2", "name": "time"}, {"content": "1", "name": "weather"}],
    ):
        first, second = paired(messages([W, T], results), set())[2:4]
        assert (first["content"], first["tool_call_id"]) == ("1", "cw")
        assert (second["content"], second["tool_call_id"]) == ("2", "ct")


def test_one_result_for_all_is_a_list_of_as_many_or_what_sharegpt_calls_an_observation() -> None:
    notes: set[str] = set()
    together = [{"content": '[{"c": 4}, {"h": 14}]'}]
    assert paired(messages([W, T], together), notes)[2]["content"] == together[0]["content"]
    assert len(notes) == 1
    assert paired(messages([W, T], [{"content": "4 and 14"}]), notes, together=True)[2]["content"] == "4 and 14"


def test_calls_of_turns_in_a_row_are_one_turn_where_results_follow() -> None:
    apart = messages([W], [])[:2] + messages([T], [{"content": "1"}, {"content": "2"}])[1:]
    notes: set[str] = set()
    joined = paired(apart, notes)
    assert joined[1]["tool_calls"] == [W, T]
    assert [message.get("tool_call_id") for message in joined[2:4]] == ["cw", "ct"]
    assert notes
    assert len(paired(apart[:3], set())) == 3
    apart[2] = {**apart[2], "train": False}
    with pytest.raises(DataError, match="message 2: calls tools before the calls of the turn before it"):
        paired(apart, set())


def test_a_result_out_of_nowhere_is_refused_and_one_behind_a_call_in_words_is_noted() -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<tool_call>f</tool_call>"}]
    notes: set[str] = set()
    assert paired([*said, {"role": "tool", "content": "r"}], notes)[2]["content"] == "r"
    assert len(notes) == 1
    for before in ([], said[:1]):
        with pytest.raises(DataError, match="follows no call"):
            paired([*before, {"role": "tool", "content": "r"}, said[1]], set())
    with pytest.raises(DataError, match="for the call 'c', but the message before it calls no tool"):
        paired([*said, {"role": "tool", "content": "r", "tool_call_id": "c"}], set())


def test_pairing_twice_changes_nothing() -> None:
    results = [{"content": str(n), "tool_call_id": f"c{n}"} for n in range(5)]
    random.Random(0).shuffle(results)
    once = paired(messages([call(str(n), "f", f"c{n}") for n in range(5)], results), set())
    notes: set[str] = set()
    assert paired(once, notes) == once
    assert notes == set()
