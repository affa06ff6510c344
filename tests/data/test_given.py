"""Rows from Python are what a file with the same rows is, by content."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_sft import train, with_rows
from qlora_sft.config import Config, load_config
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.run.folder import Run


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))


def row(number: int, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"why {number}?"}, {"role": "assistant", "content": f"because {number} ü"}]
    return {"messages": turns, **more}


def config_of(folder: Path, **held_out: str) -> Config:
    (folder / "faq.jsonl").write_text("".join(json.dumps({"q": f"q{n}", "a": f"a{n}"}) + "\n" for n in range(6)))
    (folder / "c.yaml").write_text(
        f"model: {{path: demo}}\n"
        f"data: {{train: [{{path: chat.jsonl, supervise: last}}, {{path: {folder / 'faq.jsonl'}, "
        "columns: {prompt: q, completion: a}}], held_out: [{path: chat.jsonl}, {path: other.jsonl}]}\n"
        f"output: {folder / 'run'}\n"
    )
    return load_config(folder / "c.yaml")


def answers(source: Any) -> list[str]:
    (read,) = read_sources([source], 0)
    return [each["messages"][-1]["content"] for each in read.rows]


def test_a_list_a_dataset_and_a_generator_are_the_same_file(tmp_path: Path) -> None:
    from datasets import Dataset

    def yielded() -> Iterator[dict[str, Any]]:
        yield from map(row, range(5))

    given = ([row(n) for n in range(5)], Dataset.from_list([row(n) for n in range(5)]), yielded())
    configs = [with_rows(config_of(tmp_path), {"train.chat": each}, say=quiet) for each in given]
    assert configs[0] == configs[1] == configs[2]
    source = configs[0].data.train[0]
    assert (source.name, source.supervise) == ("chat", "last")
    assert answers(source) == [f"because {n} ü" for n in range(5)]
    assert configs[0].data.held_out == config_of(tmp_path).data.held_out
    other = with_rows(config_of(tmp_path), {"train.chat": [row(n) for n in range(6)]}, say=quiet)
    assert other.data.train[0].path != source.path
    assert answers(source) == [f"because {n} ü" for n in range(5)]


def test_the_nulls_that_arrow_fills_in_are_absent_and_those_of_a_list_are_kept(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [row(0), row(1, tools=None)]
    rows[0]["messages"][1]["weight"] = 0.5
    for given, nulls in ((Dataset.from_list(rows), False), (rows, True)):
        changed = with_rows(config_of(tmp_path), {"train.chat": given}, say=quiet)
        assert ("null" in Path(changed.data.train[0].path).read_text()) is nulls


def test_a_function_changes_or_leaves_out_rows_of_files_and_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "changes_of_mine.py").write_text(
        "def loud(row):\n    return None if row['q'] == 'q2' else {**row, 'a': row['a'].upper()}\n"
        "def last(row):\n    return {'messages': row['messages'][-2:]}\nNOT = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said: list[str] = []
    named = {"faq": "changes_of_mine:loud", "other": "changes_of_mine:last"}
    long = {"messages": [*row(1)["messages"], *row(2)["messages"]]}
    config = with_rows(config_of(tmp_path), {"other": [long]}, map=named, say=said.append)
    assert answers(config.data.train[1]) == ["A0", "A1", "A3", "A4", "A5"]
    held_out = config.data.held_out
    assert isinstance(held_out, list)
    assert answers(held_out[1]) == ["because 2 ü"]
    assert (held_out[1].name, held_out[0].path) == ("other", "chat.jsonl")
    assert said[0].startswith(f"faq: {tmp_path / 'faq.jsonl'} (5 rows), mapped by changes_of_mine:loud, kept in ")
    for path, problem in (
        ("changes_of_mine:NOT", "names no function"),
        ("changes_of_mine", "names no function"),
        ("no_such_module:f", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=problem):
            with_rows(config_of(tmp_path), map={"faq": path}, say=quiet)


def test_what_cannot_be_read_later_is_refused_at_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for rows, problem in (
        ({"train.chat": [row(0), {"messages": {1, 2}}]}, r"chat: row 2 cannot be written as JSON"),
        ({"train.chat": ["text"]}, r"chat: row 1 is a str; expected a dict of columns"),
        ({"train.chat": [{"a": float("nan")}]}, r"chat: row 1 cannot be written as JSON"),
    ):
        with pytest.raises(DataError, match=problem):
            with_rows(config, rows, say=quiet)
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []
    for rows, problem in (
        ({"chat": [row(0)]}, "'chat' is the name of two sources; take one of train.chat, held_out.chat"),
        ({"chats": [row(0)]}, "'chats' is the name of no source of the configuration; take one of train.chat, train.f"),
        ([row(0)], r"rows without a name, and several training sources; give a dict by name \(chat, faq\)"),
    ):
        with pytest.raises(ConfigError, match=problem):
            with_rows(config, rows, say=quiet)


def test_a_run_on_rows_from_python_is_the_run_on_a_file(make_config: Any, tmp_path: Path) -> None:
    """With the hash of the rows in the manifest."""
    rows = [row(n) for n in range(8)]
    options = ["training.max_steps=2", "training.learning_rate=1e-2"]
    of_file = make_config(*options, rows=rows)
    train(of_file, say=quiet)
    given = make_config(*options, "data.train.0.path=rows", "data.train.0.name=chat", f"output={tmp_path / 'given'}")
    train(given, data=rows, say=quiet)
    a, b = Path(of_file.output), Path(given.output)
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (a, b)]
    assert weights[0] == weights[1]
    content = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
    assert Run.open(b).data["chat"]["sha256"] == hashlib.sha256(content.encode()).hexdigest()
    # Another process finds the rows where the configuration says.
    assert answers(load_config(b / "config.yaml").data.train[0]) == [f"because {n} ü" for n in range(8)]
