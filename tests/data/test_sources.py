"""Files, folders, globs and data sets: what is read from them, and that every fault has its file and line."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from qlora_sft.config_data import SourceConfig
from qlora_sft.data.row_faults import MAX_PROBLEMS, MAX_ROWS
from qlora_sft.data.sources import Source, read_sources
from qlora_sft.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAIRS = [{"prompt": f'"q{i}", he said;\nand', "completion": f"a{i}\té"} for i in range(5)]


def source(path: Path | str, **options: Any) -> Source:
    return read_sources([SourceConfig(str(path), **options)], seed=0)[0]


def texts(path: Path | str, **options: Any) -> list[tuple[str, str, int]]:
    """(question, answer, line) of every conversation."""
    rows = source(path, **options).rows
    return [(*(m["content"] for m in row["messages"]), row["line"]) for row in rows]


def error_of(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return refused(path)


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        source(path, **options)
    return str(caught.value)


# ------------------------------------------------------------------ faults

CASES = [
    ("{not json", "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
    ([1], "expected an object"),
    ({"words": "x"}, "found 'words'; set format: and columns:"),
    ('{"text": "\\ud83d"}', r"half a character (\ud83d without its other half)"),
    ({"messages": []}, "at least one message"),
    ({"messages": GOOD["messages"][:1]}, "no assistant turn"),
    ({"text": "x"}, "this row is text (text: every token supervised), but line 1 is messages (messages: role/content)"),
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
    different = [json.dumps({f"column {number}": "a"}) for number in range(30)]
    assert len(error_of(first, *different).splitlines()) == MAX_PROBLEMS + 1
    second.write_text("{\n")
    with pytest.raises(DataError) as caught:
        read_sources([SourceConfig(str(second)), SourceConfig(str(tmp_path / "bb.jsonl"))], seed=0)
    assert f"{second}:1" in str(caught.value)
    assert f"did you mean {second}?" in str(caught.value)
    folder = refused(tmp_path)
    assert f"{first}:1" in folder
    assert folder.endswith("1 more faults in its other files")


def test_a_fault_that_many_rows_have_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    empty, strange = {"messages": []}, {"messages": "text"}
    lines = error_of(file, GOOD, empty, strange, *[empty] * 300).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{file}:2", f"{file}:3"]
    assert lines[0].endswith(f"(the same in 301 rows, the last at {file}:303)")
    assert "the same" not in lines[1]
    many = error_of(file, *["{"] * (MAX_ROWS + 1)).splitlines()
    assert many[0].startswith(f"{file}:1: ")
    assert many[1:] == [f"{file}: stopped after 1,000 faulty rows"]


def test_a_wrong_byte_is_found_in_its_line_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    line = json.dumps(GOOD).encode() + b"\n"
    file.write_bytes(b"\xef\xbb\xbf" + line)
    assert len(source(file).rows) == 1
    file.write_bytes(line * 3 + b'{"text": "caf\xe9"}\n' + line)
    assert refused(file).startswith(f"{file}:4: not UTF-8 text (invalid continuation byte at byte 13 of the line)")


def test_columns_and_fields_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text('prompt,completion\n"q\nq",a\nq,a,b\n')
    assert refused(file).startswith(f"{file}:4: 3 fields where the header has 2")
    file.write_text("prompt,prompt\nq,a\n")
    assert f"{file}:1: two columns of one name" in refused(file)
    file.write_text('prompt,completion\nq,"a"b\n')
    assert f"{file}:2: not valid CSV" in refused(file)


def test_damaged_and_unknown_files(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-20])
    assert refused(file).startswith(f"{file}: damaged or cut off")
    file.write_bytes(b"plain")
    assert "damaged or cut off" in refused(file)
    write_zst(tmp_path / "whole.zst")
    cut = (tmp_path / "whole.zst").read_bytes()[:-3]
    for name, content in (("x.parquet", b"PAR1 nonsense"), ("x.jsonl.zst", b"nonsense"), ("y.jsonl.zst", cut)):
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name).startswith(str(tmp_path / name))
    (tmp_path / "x.xlsx").write_bytes(b"")
    assert "unknown kind of file; known are .jsonl" in refused(tmp_path / "x.xlsx")
    assert "no file matches" in refused(tmp_path / "*.csv")


def test_json_that_is_no_list_of_rows(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text('{"a": [], "b": []}')
    assert "lists in it: 'a', 'b'" in refused(file)
    file.write_text('[\n{"text": "x"},\n{"text" "y"}]')
    assert refused(file).startswith(f"{file}:3: not valid JSON (Expecting ':' delimiter at column 9)")


def test_whole_characters_may_be_escaped(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": "\\ud83d\\ude00"}'), ("a.json", '[{"text": "\\uD83D\\uDE00"}]')):
        (tmp_path / name).write_text(content)
        assert [row["text"] for row in source(tmp_path / name).rows] == ["😀"]
    (tmp_path / "a.json").write_text('[{"text": "x"}, {"text": "\\uD83D"}]')
    assert f"{tmp_path / 'a.json'}:2: half a character" in refused(tmp_path / "a.json")


def test_keys_of_data_sets_are_refused_on_files(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(GOOD))
    assert "a file has no split or revision" in refused(tmp_path / "chat.jsonl", split="test", revision="x")


# ------------------------------------------------------------------ kinds of files


def as_lines(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, PAIRS[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(PAIRS)


def write_zst(path: Path) -> None:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(as_lines(PAIRS))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(as_lines(PAIRS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(as_lines(PAIRS))),
    "a.jsonl.zst": write_zst,
    "a.json": lambda path: path.write_text(json.dumps(PAIRS)),
    "b.json": lambda path: path.write_text(json.dumps({"version": 1, "data": PAIRS})),
    "c.json": lambda path: path.write_bytes(as_lines(PAIRS)),
    "a.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(PAIRS), path),
    "a.csv": lambda path: write_csv(path, ","),
    "a.tsv": lambda path: write_csv(path, "\t"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    # In the CSV files the header is line 1 and every record has two lines, because its question has.
    numbers = [2, 4, 6, 8, 10] if name.endswith("sv") else [1, 2, 3, 4, 5]
    expected = [(p["prompt"], p["completion"], n) for p, n in zip(PAIRS, numbers, strict=True)]
    assert texts(tmp_path / name) == expected
    # A second look at the same source finds the same.
    rows = source(tmp_path / name).rows
    assert list(rows) == list(rows)


def test_arguments_of_one_call_do_not_leak_into_another_through_parquet(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {"day": 3}}]
    turns = [{"role": "assistant", "content": "", "tool_calls": [each]} for each in calls]
    parquet.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    (row,) = source(tmp_path / "a.parquet").rows
    found = [message["tool_calls"][0]["function"] for message in row["messages"]]
    assert found == calls


def test_text_files_hold_a_document_per_line_unless_blank_lines_part_them(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    said: list[str] = []
    for content, documents, layout in (
        ("one\ntwo\n\n", [("one", 1), ("two", 2)], "lines"),
        ("\none\nmore\n\n\ntwo\n", [("one\nmore", 2), ("two", 6)], "blank lines"),
    ):
        file.write_text(content)
        (found,) = read_sources([SourceConfig(str(file))], 0, said.append)
        assert [(row["text"], row["line"]) for row in found.rows] == documents
        assert (
            said.pop() == f"a: detected text (text: every token supervised), documents separated by {layout} in {file}"
        )


def test_folders_and_globs_take_every_file_and_say_what_they_leave_out(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(("b.jsonl", "a.jsonl", "deep/c.jsonl")):
        (tmp_path / name).write_bytes(as_lines([{"prompt": f"q{number}", "completion": "a"}]))
    (tmp_path / "notes.md").write_text("x")
    said: list[str] = []
    (found,) = read_sources([SourceConfig(str(tmp_path), name="all")], 0, said.append)
    assert [(row["messages"][0]["content"], Path(row["file"]).name) for row in found.rows] == [
        ("q1", "a.jsonl"), ("q0", "b.jsonl"), ("q2", "c.jsonl"),
    ]  # fmt: skip
    assert "1 files of other kinds are left out: notes.md" in said[0]
    assert said[1].endswith("a.jsonl and 2 more files")
    assert [question for question, *_ in texts(tmp_path / "*.jsonl")] == ["q1", "q0"]
    # Files of one source may differ in form; one file may not.
    (tmp_path / "d.json").write_text(json.dumps([GOOD]))
    assert len(source(tmp_path).rows) == 4


def test_a_format_that_is_set_is_not_guessed_and_unused_columns_are_told_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_lines([{"text": "t", "prompt": "p", "completion": "c"}] * 4))
    said: list[str] = []
    (found,) = read_sources([SourceConfig(str(file), format="text")], 0, said.append)
    assert [row["text"] for row in found.rows] == ["t"] * 4
    assert said == [
        f"a: configured text (text: every token supervised) in {file}",
        f"a: not used: column 'completion' (first in {file}:1), column 'prompt' (first in {file}:1); "
        "map columns with columns: if they hold something to learn",
    ]


# ------------------------------------------------------------------ choosing rows


def test_max_rows_and_fraction_draw_the_same_rows_every_time_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(GOOD) + "\n" for _ in range(50)))
    for options, count in (({"max_rows": 10}, 10), ({"fraction": 0.3}, 15), ({"fraction": 0.5, "max_rows": 7}, 7)):
        lines = [row["line"] for row in source(file, **options).rows]
        assert lines == [row["line"] for row in source(file, **options).rows]
        assert lines == sorted(set(lines))
        assert len(lines) == count
        assert lines != list(range(1, count + 1))
    other = read_sources([SourceConfig(str(file), max_rows=10)], seed=1)[0]
    assert [row["line"] for row in other.rows] != [row["line"] for row in source(file, max_rows=10).rows]


def test_a_file_that_breaks_after_it_was_checked_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    rows = source(file).rows
    file.write_text("{\n")
    with pytest.raises(DataError, match="was changed while it was read"):
        list(rows)


# ------------------------------------------------------------------ Hugging Face data sets


@pytest.fixture
def dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out like a data set on the Hub, with two splits."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(as_lines(PAIRS[:3]))
    (folder / "test.jsonl").write_bytes(as_lines(PAIRS[3:]))
    return folder


def test_splits_and_streams_of_a_data_set(dataset_folder: Path) -> None:
    assert [answer for _, answer, _ in texts(dataset_folder, split="test")] == ["a3\té", "a4\té"]
    assert [line for *_, line in texts(dataset_folder, split="train", streaming=True, max_rows=2)] == [1, 2]
    assert "it has no split 'dev'; set split: to one that it has" in refused(dataset_folder, split="dev")


def test_a_data_set_written_by_save_to_disk(dataset_folder: Path, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "saved"))
    assert [line for *_, line in texts(tmp_path / "saved")] == [1, 2, 3, 4, 5]
