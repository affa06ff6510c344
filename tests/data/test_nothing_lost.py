"""Whatever stands in a row is in the rendering, or the row is refused, or its key is named in the ledger."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_sft.config_data import DataConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.ledger import ledger_table
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import DataError

SCHEMA = {"type": "object", "properties": {"pZa": {"type": "string", "description": "word02x"}}, "required": ["pZa"]}
TOOL = {"name": "toolA", "description": "word01x", "parameters": SCHEMA}
CALL = {"id": "id7", "type": "function", "function": {"name": "toolA", "arguments": {"pZa": "word03x"}}}
QUESTION = {"role": "user", "content": "word04x"}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "word05x"},
            QUESTION,
            {"role": "assistant", "content": "word06x", "reasoning_content": "word07x", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "id7", "content": "word08x"},
            {"role": "assistant", "content": [{"type": "text", "text": "word09x"}], "weight": 0.5},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "anthropic": {
        "system": [{"type": "text", "text": "word05x"}],
        "messages": [
            QUESTION,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "word07x"},
                    {"type": "text", "text": "word06x"},
                    {"type": "tool_use", "id": "id7", "name": "toolA", "input": {"pZa": "word03x"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "id7", "content": [{"type": "text", "text": "word08x"}]},
                    {"type": "text", "text": "word10x"},
                ],
            },
            {"role": "assistant", "content": "word09x"},
        ],
        "tools": [{"name": "toolA", "description": "word01x", "input_schema": SCHEMA}],
    },
    "sharegpt": {
        "system": "word05x",
        "conversations": [
            {"from": "human", "value": "word04x"},
            {"from": "gpt", "value": "word06x"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "word08x"},
            {"from": "gpt", "value": "word09x"},
        ],
        "tools": json.dumps([TOOL]),
    },
    "alpaca": {
        "instruction": "word04x",
        "input": "word10x",
        "output": "word09x",
        "system": "word05x",
        "history": [["word11x", "word12x"]],
    },
    "prompt_completion": {
        "prompt": [QUESTION, {"role": "assistant", "content": "word06x"}, {"role": "user", "content": "word10x"}],
        "completion": [{"role": "assistant", "content": "<think>word07x</think>word09x"}],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "text": {"text": "word04x and word05x"},
}
# What these hold is not written: it says who speaks, what a part is, and whose result it is.
STRUCTURE = {"role", "from", "type", "id", "tool_call_id", "tool_use_id", "weight", "enable_thinking"}
NEW = "word99x"
NAMES = [
    "functions", "tools", "chosen", "rejected", "name", "loss_scale", "input_schema", "parameters", "arguments",
    "input", "reasoning", "thinking", "text", "value", "content", "function_call", "tool_calls", "cache_control",
    "signature", "citations", "images", "system", "prefix", "is_error", "strict", "tool_use_id", "train", "loss",
    "label", "wordy",
]  # fmt: skip
EMPTIES = [None, "", [], {}, "[]", "null"]


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in the value, in order."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(item)


def words(value: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every text that is content, with the keys above it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from () if key in STRUCTURE else words(item, (*above, key))
    elif isinstance(value, list):
        for item in value:
            yield from words(item, above)
    elif isinstance(value, str) and value.startswith(("[", "{", '"')):
        yield from words(json.loads(value), above)
    elif isinstance(value, str):
        yield from ((word, above) for word in re.findall(r"word\d+x", value))


@st.composite
def mutated(draw: st.DrawFn, form: str) -> dict[str, Any]:
    """The row of this form with one to two of: a key more, a key renamed, a value emptied or wrapped."""
    row = copy.deepcopy(ROWS[form])
    for _ in range(draw(st.integers(1, 2))):
        node = draw(st.sampled_from(list(nodes(row))))
        key = draw(st.sampled_from([*node, "wordy"])) if node else "wordy"
        change = draw(st.sampled_from(["more", "more", "rename", "empty", "wrap"]))
        if change == "more" or key not in node:
            values = [NEW, [NEW], {"name": NEW}, [{"name": NEW}], [{"type": "text", "text": NEW}]]
            node[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(st.sampled_from(values)))
        elif change == "rename":
            node[draw(st.sampled_from([key + "s", key.upper(), "x_" + key]))] = node.pop(key)
        elif change == "empty":
            node[key] = copy.deepcopy(draw(st.sampled_from(EMPTIES)))
        else:
            node[key] = draw(st.sampled_from([[node[key]], json.dumps(node[key])]))
    return row


def outcome(row: dict[str, Any], folder: Path, tokenizer: Any) -> str | None:
    """All that was rendered and said; None if the row was refused, with its file and line."""
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    said: list[str] = []
    try:
        sources = read_sources([SourceConfig(str(file))], 0, said.append)
        prepared = render_sources(sources, DataConfig([TrainSourceConfig("a")]), tokenizer)
    except DataError as error:
        if str(file) in str(error):
            return None
        raise
    text = "".join(tokenizer.decode(document.input_ids) for document in prepared.all_documents)
    return text + ledger_table(prepared.ledger)


@pytest.mark.parametrize("form", ROWS)
def test_the_row_as_it_is_is_rendered_whole(form: str, tmp_path: Path, tokenizer: Any) -> None:
    found = outcome(ROWS[form], tmp_path, tokenizer)
    assert found is not None
    assert [word for word, _ in words(ROWS[form]) if word not in found] == []


@pytest.mark.parametrize("form", ROWS)
def test_every_key_is_used_or_refused_or_named(form: str, tmp_path: Path, tokenizer: Any) -> None:
    accepted = [0]

    @settings(max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(row=mutated(form))
    def run(row: dict[str, Any]) -> None:
        found = outcome(row, tmp_path, tokenizer)
        if found is None:
            return
        accepted[0] += 1
        lost = [
            (w, above) for w, above in words(row) if w not in found and not any(repr(key) in found for key in above)
        ]
        assert lost == [], row

    run()
    assert accepted[0] > 20
