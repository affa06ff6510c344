"""A file that is not what its name says is refused with one error that names the cause and the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from misread_files import BAD, OTHER, ROW, lines

from qlora_sft.config import SourceConfig
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import DataError

CASES = Path(__file__).parents[1] / "cases"


def fault(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_sources([SourceConfig(str(path), **settings)], 0)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("list_in_jsonl.jsonl", ": it is a JSON list; name it .json, or write one object per line"),
        ("indented_objects.jsonl", ": its objects go over several lines; write one object per line"),
        (
            "python_quotes.csv",
            ":2: 'messages' is not JSON: it has Python's quotes, as str() and pandas write them",
        ),
    ],
)
def test_the_shipped_cases_are_one_error(name: str, cause: str) -> None:
    assert fault(CASES / name).startswith(f"{CASES / name}{cause}")
    assert len(fault(CASES / name).splitlines()) == 1


@pytest.mark.parametrize("name", BAD)
def test_the_cause_is_named_once(name: str, tmp_path: Path) -> None:
    file, content, cause = BAD[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = fault(path)
    assert cause in said
    assert said.startswith(str(path))
    assert len(said.splitlines()) == 1


def test_a_bad_line_in_a_good_file_is_still_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(ROW) + "[1,\n" + lines(OTHER) + "{'a': 1}\n")
    first, second = fault(path).splitlines()
    assert first.startswith(f"{path}:2: not valid JSON (Expecting value")
    assert second.startswith(f"{path}:4: not valid JSON (it has Python's quotes")


def test_every_file_of_a_folder_is_heard(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt;completion\na;b\n")
    (tmp_path / "b.jsonl").write_text(json.dumps([ROW]))
    (tmp_path / "c.jsonl").write_text(lines(ROW))
    assert [line.split(":")[0] for line in fault(tmp_path).splitlines()] == [
        str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'prompt,completion\n"a;b",c\n'),
        ("a.csv", "text\nsome; text; with semicolons\n"),
        ("a.txt", '{"not": "ours"}\nmore\n'),
        ("a.txt", "[a list]\n"),
        ("a.csv", "messages\n" + '"' + json.dumps(ROW["messages"]).replace('"', '""') + '"\n'),
        ("a.json", json.dumps([ROW, OTHER], indent=2)),
        ("a.json", lines(ROW, OTHER)),
    ],
)
def test_what_only_looks_similar_is_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert len(read_sources([SourceConfig(str(tmp_path / name))], 0)[0].rows) > 0
