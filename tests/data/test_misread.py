"""A file that is not what its name says is refused with one error that names the cause and the cure."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import SourceConfig
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import DataError

CASES = Path(__file__).parents[1] / "cases"
ROW: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
OTHER: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "n": 1.5,
}


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


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


BAD: dict[str, tuple[str, str | bytes, str]] = {
    "list on one line": ("a.jsonl", json.dumps([ROW, OTHER]), "it is a JSON list; name it .json"),
    "list over lines": ("a.ndjson", json.dumps([ROW, OTHER], indent=1), "it is a JSON list; name it .json"),
    "list behind a mark": ("a.jsonl", "\ufeff\n" + json.dumps([ROW], indent=2), "it is a JSON list"),
    "indented objects": ("a.jsonl", "\n".join(json.dumps(r, indent=2) for r in (ROW, OTHER)), "over several lines"),
    "one indented object": ("a.jsonl", json.dumps(ROW, indent=4), "over several lines"),
    "indented, .json": ("a.json", "\n".join(json.dumps(r, indent=2) for r in (ROW, OTHER)), "over several lines"),
    "lists, .json": ("a.json", json.dumps([ROW], indent=1) + "\n" + json.dumps([ROW]), "several JSON lists"),
    "commas": ("a.jsonl", lines(ROW, OTHER).replace("\n", ",\n"), "its lines end in commas"),
    "Python's dicts": ("a.jsonl", f"{ROW}\n{OTHER}\n", "its lines are no JSON: it has Python's quotes"),
    "Python's list, .json": ("a.json", str([ROW, OTHER]), "it has Python's quotes"),
    "lists of messages": ("a.jsonl", lines(ROW["messages"], OTHER["messages"]), 'write {"messages": [...]}'),
    "lists of turns": ("a.jsonl", lines([{"from": "human", "value": "x"}]), 'write {"conversations": [...]}'),
    "lists of messages, .json": ("a.json", json.dumps([ROW["messages"]]), 'write {"messages": [...]}'),
    "quotes in a cell of JSON Lines": ("a.jsonl", lines({"messages": str(ROW["messages"])}), "it has Python's quotes"),
    "numpy's quotes": (
        "a.csv",
        "id,conversations\n1,\"[{'from': 'human', 'value': 'x'}\n {'from': 'gpt', 'value': 'y'}]\"\n", "quotes",
    ),
    "array in a cell": ("a.csv", "messages\n\"array([{'role': 'user'}], dtype=object)\"\n", "it has Python's quotes"),
    "broken JSON in a cell": ("a.csv", 'messages\n"[{""role"": ""user"""\n', "'messages' is not JSON: Expecting ','"),
    "text in a cell": ("a.csv", "messages\nHello\n", "'messages' is not JSON: Expecting value at column 1"),
    "quotes in tools": (
        "a.jsonl", lines({**ROW, "tools": "[{'name': 'f'}]"}), "'tools' is not valid JSON (it has Python's quotes",
    ),
    "semicolons": ("a.csv", "prompt;completion\na;b\n", "parted by semicolons; save it with commas (.csv) or tabs"),
    "bars": ("a.csv", "prompt|completion\na|b\n", "parted by bars"),
    "tabs in .csv": ("a.csv", "prompt\tcompletion\na\tb\n", "parted by tabs; name it .tsv"),
    "commas in .tsv": ("a.tsv", "prompt,completion\na,b\n", "parted by commas; name it .csv"),
    "rows in .txt": ("a.txt", lines(ROW, OTHER), "it holds JSON Lines, which would be trained on as text"),
    "Parquet": ("a.jsonl", b"PAR1\x15\x00\x15\xff", "it is a Parquet file; name it .parquet"),
    "Excel": ("a.csv", b"PK\x03\x04\x14\x00\xff", "a ZIP archive or an Excel file"),
    "gzip": ("a.jsonl", gzip.compress(lines(ROW).encode()), "compressed with gzip; add .gz to its name"),
    "gzip inside gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(lines(ROW).encode())), "compressed with gzip"),
    "UTF-16": ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "it is UTF-16 text; re-save it as UTF-8"),
    "UTF-16, .jsonl": ("a.jsonl", lines(ROW, OTHER).encode("utf-16"), "it is UTF-16 text"),
    "Git LFS": ("a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "it is a pointer of Git LFS"),
    "web page": ("a.jsonl", "\n<!DOCTYPE html>\n<html>\n</html>\n", "it is a web page"),
    "key twice": ("a.jsonl", '{"prompt": "a", "completion": "b", "prompt": "c"}\n', "the key 'prompt' stands twice"),
    "key twice, .json": ("a.json", '[{"messages": [{"role": "user", "role": "x"}]}]', "the key 'role' stands twice"),
    "number without end": ("a.jsonl", '{"prompt": ' + "9" * 5000 + "}\n", "not valid JSON (Exceeds the limit"),
    "number without end, .json": ("a.json", "[" + "9" * 5000 + "]", "not valid JSON (Exceeds the limit"),
    "nested too deep": ("a.jsonl", "[" * 9999 + "\n", "it is a JSON list"),
    "nested too deep, .json": ("a.json", '{"a":' * 99999, "nested too deep"),
    "nested too deep in a cell": ("a.csv", "prompt,completion,tools\na,b," + "[" * 99999 + "\n", "nested too deep"),
}  # fmt: skip


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
