from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import Config
from qlora_sft.data import plan, store
from qlora_sft.data.sources import read_sources
from qlora_sft.data.splits import read_data
from qlora_sft.data.template import choose_chat_format
from qlora_sft.errors import DataError
from qlora_sft.model.tokenizer import load_tokenizer
from qlora_sft.run.manifest import describe_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))


def run(config: Config, found: Callable[[], object] = lambda: None) -> tuple[Any, list[str]]:
    """Plans the data of a configuration. found: called between the first reading and the second."""
    tokenizer = load_tokenizer(config.model, config.model.path)
    said: list[str] = []
    train = read_sources(config.data.train, config.seed)
    held_out = read_sources(config.data.held_out, config.seed)
    found()
    return plan.plan_data(config, train, held_out, tokenizer, choose_chat_format(tokenizer), said.append), said


def test_the_second_time_is_the_same_as_the_first(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("data.train.0.loss_weight=0.3", "training.epochs=2", "data.max_length=80")
    first, said = run(config)
    monkeypatch.setattr(plan, "render_sources", lambda *_: pytest.fail("rendered again"))
    second, said_again = run(config)
    for kept, made in zip(second[:2], first[:2], strict=True):
        assert list(kept.all_documents) == list(made.all_documents)
        assert kept.ledger == made.ledger
    assert second[2] == first[2]
    assert said_again[1:] == said
    assert "cache" in said_again[0]
    assert any("dropped" in text for text in said)


def test_a_file_that_is_removed_meanwhile_is_a_fault_of_the_data(make_config: Any) -> None:
    config = make_config()
    file = Path(config.data.train[0].path)
    (train, *_), _ = run(config)
    with pytest.raises(DataError, match=f"{file}: the file was removed or renamed after it had been found; put"):
        run(config, file.unlink)
    with pytest.raises(DataError, match="removed or renamed"):
        describe_data(train.ledger)


@pytest.mark.parametrize(
    "change", ["seed=1", "data.max_length=300", "data.packing=ffd", "data.train.0.supervise=last", "training.epochs=3"]
)
def test_a_change_of_a_setting_is_a_new_preparation(make_config: Any, change: str) -> None:
    run(make_config())
    _, said = run(make_config(change))
    assert "cache" not in said[0]


def test_a_change_of_the_file_or_the_template_is_a_new_preparation(make_config: Any) -> None:
    config = make_config()
    run(config)
    file = Path(config.data.train[0].path)
    rows = file.read_text().splitlines()
    row = json.loads(rows[0])
    row["messages"][1]["content"] = row["messages"][1]["content"].replace("Answer", "Reply!")
    file.write_text("\n".join([json.dumps(row), *rows[1:]]))
    assert "cache" not in run(config)[1][0]
    _, said = run(make_config("model.chat_template=chatml-think"))
    assert "cache" not in said[0]


def test_another_version_of_what_renders_is_a_new_preparation(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config())
    monkeypatch.setattr(store, "version", lambda name: f"{name} of tomorrow")
    assert "cache" not in run(make_config())[1][0]
    assert "cache" in run(make_config())[1][0]


def test_other_questions_of_an_evaluation_are_a_new_preparation(make_config: Any, tmp_path: Path) -> None:
    """As many rows are removed, but others: what is kept has been trained on the questions that are asked now."""
    asked = [" ".join(f"word{row}{n}" for n in range(20)) for row in range(4)]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"Answer {n} of it"}]}
        for n, text in enumerate(asked)
    ]
    evaluation = tmp_path / "evaluation.jsonl"
    config = make_config(f"data.decontaminate=[{evaluation}]", rows=rows)
    tokenizer = load_tokenizer(config.model, config.model.path)
    for removed in (1, 2):
        evaluation.write_text(json.dumps({"text": asked[removed]}) + "\n")
        sources = read_data(config, lambda _: None)
        train, _, _ = plan.plan_data(
            config, sources.train, sources.held_out, tokenizer, choose_chat_format(tokenizer), lambda _: None
        )
        trained = [tokenizer.decode(document.input_ids) for document in train.all_documents]
        assert [n for n in range(4) if not any(f"Answer {n}" in text for text in trained)] == [removed]


def test_another_end_of_a_text_is_a_new_preparation(make_config: Any, tmp_path: Path) -> None:
    """Also where the model stops at both ends, so that the chat format is the same."""
    config = make_config(rows=[{"text": "one thing"}, {"text": "another thing"}])
    tokenizer = load_tokenizer(config.model, config.model.path)
    for end in ("<|im_end|>", "<|endoftext|>"):
        tokenizer.eos_token = end
        chat = choose_chat_format(tokenizer, tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
        sources = read_data(config, lambda _: None)
        train, _, _ = plan.plan_data(config, sources.train, [], tokenizer, chat, lambda _: None)
        assert {document.input_ids[-1] for document in train.all_documents} == {tokenizer.convert_tokens_to_ids(end)}


def test_a_preparation_that_was_cut_short_is_not_used(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    monkeypatch.setattr(store.np, "savez", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    assert "cache" not in run(config)[1][0]


def test_rows_of_both_splits_that_cannot_be_rendered_come_together(make_config: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    config = make_config(f"data.held_out=[{{path: {tmp_path / 'held.jsonl'}}}]", rows=[{"messages": turns}])
    with pytest.raises(DataError) as caught:
        run(config)
    where = [line.split(": ")[0] for line in str(caught.value).splitlines()]
    assert where == [f"{tmp_path / 'chat.jsonl'}:1", f"{tmp_path / 'held.jsonl'}:1"]
