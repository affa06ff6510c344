"""What a source's settings and an over-long row do to documents and ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_sft.config import DataConfig, load_config
from qlora_sft.config_data import TrainSourceConfig
from qlora_sft.data.ledger import ledger_table
from qlora_sft.data.prepare import Prepared, render_sources
from qlora_sft.data.render import Rendered
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import DataError


def turns(count: int, words: int = 5) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(count):
        messages.append({"role": "user", "content": f"Question {turn} " + "why " * words})
        messages.append({"role": "assistant", "content": f"Answer {turn} " + "so " * words})
    return messages


def prepare(
    tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], source: dict[str, Any] | None = None, **options: Any
) -> Prepared:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig([TrainSourceConfig(str(file), **(source or {}))], **options)
    return render_sources(read_sources(config.train, 0), config, tokenizer)


def trained(document: Rendered, tokenizer: Any) -> str:
    return tokenizer.decode([i for i, w in zip(document.input_ids, document.weights, strict=True) if w > 0])


def test_supervise(tmp_path: Path, tokenizer: Any) -> None:
    row = {"messages": turns(2, 0)}
    texts = {}
    for supervise in ("assistant", "last", "all"):
        prepared = prepare(tmp_path, tokenizer, [row], {"supervise": supervise})
        (document,) = prepared.all_documents
        texts[supervise] = trained(document, tokenizer)
    assert texts["assistant"] == "Answer 0 <|im_end|>Answer 1 <|im_end|>"
    assert texts["last"] == "Answer 1 <|im_end|>"
    # All but the first token, which nothing predicts.
    assert texts["all"] == tokenizer.decode(document.input_ids[1:])
    assert prepared.ledger["chat"].supervised == len(document.input_ids) - 1


def test_thinking_of_the_source_and_of_the_row(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": turns(1)}, {"messages": turns(1), "chat_template_kwargs": {"enable_thinking": True}}]
    documents = prepare(tmp_path, tokenizer, rows, {"thinking": "off"}).all_documents
    texts = [tokenizer.decode(document.input_ids) for document in documents]
    assert ["/no_think" in text for text in texts] == [True, False]
    assert ["/think<" in text for text in texts] == [False, True]


def test_on_and_off_are_words_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {path: demo}\noutput: out\ndata:\n  train: [{path: a, thinking: on}, {path: b, thinking: off}]\n"
    )
    assert [source.thinking for source in load_config(file).data.train] == ["on", "off"]
    assert load_config(file, ["data.train.0.allow_special=true"]).data.train[0].allow_special


def test_allow_special_lets_structure_through(tmp_path: Path, tokenizer: Any) -> None:
    row = {"messages": [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]}
    counts = []
    for allow in (False, True):
        (document,) = prepare(tmp_path, tokenizer, [row], {"allow_special": allow}).all_documents
        counts.append(document.input_ids.count(tokenizer.eos_token_id))
    assert counts == [2, 3]


def test_loss_weight_multiplies_what_the_messages_say(tmp_path: Path, tokenizer: Any) -> None:
    messages = turns(2, 0)
    messages[2]["weight"] = 0.5  # type: ignore[assignment]
    (document,) = prepare(tmp_path, tokenizer, [{"messages": messages}], {"loss_weight": 3.0}).all_documents
    assert sorted(set(document.weights)) == [0.0, 1.5, 3.0]


LONG = [{"messages": turns(1)}, {"messages": turns(9)}, {"messages": turns(1, 300)}]


def test_drop(tmp_path: Path, tokenizer: Any) -> None:
    ledger = prepare(tmp_path, tokenizer, LONG, max_length=100).ledger["chat"]
    assert (ledger.read, ledger.kept, ledger.shortened) == (3, 1, 0)
    assert ledger.dropped["too long"].rows == 2
    assert ledger.dropped["too long"].first == [f"{tmp_path}/chat.jsonl:2", f"{tmp_path}/chat.jsonl:3"]


def test_truncate_left_turns_keeps_the_system_message_and_the_last_turns(tmp_path: Path, tokenizer: Any) -> None:
    prepared = prepare(tmp_path, tokenizer, LONG, max_length=100, overlong="truncate_left_turns")
    ledger = prepared.ledger["chat"]
    assert (ledger.kept, ledger.shortened, ledger.dropped["too long"].rows) == (2, 1, 1)
    text = tokenizer.decode(prepared.all_documents[1].input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion ")
    assert "Answer 8" in text
    assert "Answer 0" not in text
    assert "1 rows truncated or split" in ledger_table(prepared.ledger)


def test_truncate_cuts_the_end_and_drops_what_has_nothing_left_to_train(tmp_path: Path, tokenizer: Any) -> None:
    prepared = prepare(tmp_path, tokenizer, LONG, max_length=100, overlong="truncate")
    ledger = prepared.ledger["chat"]
    assert (ledger.kept, ledger.shortened) == (2, 1)
    assert ledger.dropped["nothing supervised within max_length"].first == [f"{tmp_path}/chat.jsonl:3"]
    assert len(prepared.all_documents[1].input_ids) == 100


def test_error_names_the_line_and_the_cure(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl:2: \d+ tokens, more than data\.max_length=100; raise"):
        prepare(tmp_path, tokenizer, LONG, max_length=100, overlong="error")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(2, 40), words=st.integers(1, 120))
def test_plain_text_is_split_and_nothing_of_it_is_lost(tmp_path: Path, tokenizer: Any, length: int, words: int) -> None:
    text = " ".join(f"word{i}" for i in range(words))
    prepared = prepare(tmp_path, tokenizer, [{"text": text}], max_length=length)
    ids = [i for document in prepared.all_documents for i in document.input_ids]
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    # A last piece of one token would train nothing.
    assert ids == (whole if len(whole) % length != 1 else whole[:-1])
    assert all(len(document.input_ids) <= length for document in prepared.all_documents)
    assert all(document.weights == [0.0, *[1.0] * (len(document.input_ids) - 1)] for document in prepared.all_documents)
    assert prepared.ledger["chat"].kept == 1
