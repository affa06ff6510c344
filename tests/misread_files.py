"""Files that are not what their names say, and the cause that is named."""

from __future__ import annotations

import gzip
import json
from typing import Any

ROW: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
OTHER: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "n": 1.5,
}


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
    "semicolons": ("a.csv", "prompt;completion\na;b\n", "separated by semicolons; save it with commas (.csv) or tabs"),
    "bars": ("a.csv", "prompt|completion\na|b\n", "separated by bars"),
    "tabs in .csv": ("a.csv", "prompt\tcompletion\na\tb\n", "separated by tabs; name it .tsv"),
    "commas in .tsv": ("a.tsv", "prompt,completion\na,b\n", "separated by commas; name it .csv"),
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
