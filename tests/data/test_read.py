import json
from pathlib import Path

import pytest

from qlora_sft.config import SourceConfig
from qlora_sft.data.read import MAX_PROBLEMS, read_sources
from qlora_sft.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def read(path: Path, **options: int) -> list[dict]:
    return read_sources([SourceConfig(str(path), **options)], seed=0)[0].rows


def error_of(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def messages(*pairs: tuple[str, object], **last: object) -> dict:
    result = [{"role": role, "content": content} for role, content in pairs]
    result[-1].update(last)
    return {"messages": result}


CASES = [
    ("{not json", "not valid JSON"),
    ([1], "expected an object"),
    ({"text": "x"}, "found 'text'"),
    ({"messages": []}, "at least one message"),
    (messages(("user", "hi"), ("asistant", "x")), "unknown role 'asistant'; did you mean 'assistant'?"),
    (messages(("user", "hi"), ("gpt", "x")), "use one of system, user, assistant, tool"),
    (messages(("user", "hi")), "no assistant turn"),
    (messages(("user", "hi"), ("assistant", "")), "neither content nor tool_calls"),
    (messages(("user", None), ("assistant", "x")), "'content' must be a text, got nothing"),
    (messages(("user", "hi"), ("assistant", "x"), weight=-1), "must not be negative"),
    (messages(("user", "hi"), ("assistant", "x"), train="no"), "'train' has the wrong type"),
    (messages(("user", "hi"), ("assistant", ""), tool_calls=[{"name": "f", "arguments": "{"}]), "not valid JSON"),
    (messages(("user", "hi"), ("assistant", ""), tool_calls=[{"function": {}}]), "needs a function with a 'name'"),
    ({**GOOD, "tools": {}}, "'tools' must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), CASES, ids=[message for _, message in CASES])
def test_every_fault_names_file_line_and_cure(tmp_path: Path, row: object, message: str) -> None:
    file = tmp_path / "chat.jsonl"
    text = error_of(file, GOOD, row, GOOD)
    assert text.startswith(f"{file}:2: ")
    assert message in text
    assert len(text.splitlines()) == 1


def test_an_empty_file_and_a_file_of_blank_lines(tmp_path: Path) -> None:
    for lines in ([], ["", "  "]):
        assert "no conversations" in error_of(tmp_path / "empty.jsonl", *lines)


def test_faults_of_all_lines_and_all_files_come_together(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert len(error_of(first, *["{"] * 30).splitlines()) == MAX_PROBLEMS + 1
    second.write_text("{\n")
    with pytest.raises(DataError) as caught:
        read_sources([SourceConfig(str(second)), SourceConfig(str(tmp_path / "bb.jsonl"))], seed=0)
    assert f"{second}:1" in str(caught.value)
    assert f"did you mean {second}?" in str(caught.value)


def test_other_encodings_are_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n")
    assert len(read(file)) == 1
    file.write_bytes(json.dumps(messages(("user", "é"), ("assistant", "x")), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read(file)


def test_max_rows_draws_the_same_rows_every_time_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(GOOD) + "\n" for _ in range(50)))
    lines = [row["line"] for row in read(file, max_rows=10)]
    assert lines == [row["line"] for row in read(file, max_rows=10)]
    assert lines == sorted(set(lines))
    assert len(lines) == 10
    assert lines != list(range(1, 11))
