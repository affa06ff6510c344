"""Recognise, by how they begin, files and cells that are not what they seem, so that one error names the cause.

If they were read as their name says, every line would give a fault, and none would say what is wrong.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject

# Bytes that are enough to hold the first object of a file.
HEAD = 2**20
_MAGIC = {
    b"PAR1": "it is a Parquet file; name it .parquet",
    b"PK\x03\x04": "it is a ZIP archive or an Excel file; unpack it, or save it as CSV",
    b"\x1f\x8b": "it is compressed with gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; add .zst to its name",
    b"BZh": "it is compressed with bzip2; unpack it",
    b"\xfd7zXZ": "it is compressed with xz; unpack it",
    b"ARROW1": "it is an Arrow file; save it as Parquet",
    b"SQLite format 3": "it is an SQLite database; export it as CSV",
    b"\xff\xfe": "it is UTF-16 text; re-save it as UTF-8",
    b"\xfe\xff": "it is UTF-16 text; re-save it as UTF-8",
    b"version https://git-lfs": "it is a pointer of Git LFS and not the file itself; run `git lfs pull`",
}
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def check_beginning(path: Path, begin: bytes) -> None:
    """Raises `DataError` if a file that should be text begins like something else."""
    for magic, what in _MAGIC.items():
        if begin.startswith(magic):
            raise DataError(f"{path}: {what}")
    if re.match(rb"\s*<(!doctype html|html)\b", begin, re.IGNORECASE):
        raise DataError(f"{path}: it is a web page, perhaps one that says why there is no file; download it again")


def no_lines_of_json(head: str, ending: str) -> str | None:
    """Returns why a file whose first line is not JSON is not JSON Lines; None if only that line is at fault.

    head: the beginning of the file. ending: the ending of its name.
    """
    text = head.lstrip("\ufeff \t\r\n")
    first = text.split("\n", 1)[0].strip()
    if text.startswith("["):
        return _list_cure(ending)
    if _reads(first.removesuffix(",")) and first.endswith(","):
        return "its lines end in commas, as inside a JSON list; remove them, or put [ ] around all and name it .json"
    if text.startswith("{") and _spans_lines(text):
        return "its objects go over several lines; write one object per line (jq -c . FILE does that)"
    if why := pythons_quotes(first):
        return f"its lines are no JSON: {why}"
    return None


def rows_in_a_text(line: str) -> str | None:
    """Returns a fault if the first line of a .txt file is a row of JSON Lines, whose braces would be trained on."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = {"messages", "conversations", "instruction", "prompt", "question", "text"}
    return "it holds JSON Lines, which would be trained on as text; name it .jsonl" if known & row.keys() else None


def list_in_a_line(row: object) -> str | None:
    """Returns what a row that is a list should have been; None if it is not a list."""
    if not isinstance(row, list):
        return None
    inside = [item for item in row if isinstance(item, dict)]
    if inside and all("role" in item or "from" in item for item in inside):
        key = "messages" if "role" in inside[0] else "conversations"
        return f'a row is an object, and this line is a list of messages; write {{"{key}": [...]}}'
    return _list_cure(".jsonl") if inside else None


def _list_cure(ending: str) -> str:
    if ending == ".json":
        return "it is several JSON lists behind one another; make one list of them, or write one object per line"
    return "it is a JSON list; name it .json, or write one object per line"


def _spans_lines(text: str) -> bool:
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _reads(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def pythons_quotes(text: str) -> str | None:
    """Returns a fault with its cure if a text is what Python prints of a list."""
    if re.match(r"\s*(array\()?[\[({\s]*[\[{]\s*'", text):
        return "it has Python's quotes, as str() and pandas write them; write it with json.dumps"
    return None


def half_character(row: object) -> str | None:
    """Returns a fault if a text holds half of a surrogate pair.

    JSON can escape one, and no tokenizer can encode it.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return f"half a character (\\u{ord(half):04x} without its other half); the text was cut in the middle of it"
    return None


def broken_cell(row: JsonObject, columns: dict[str, str] | None) -> str | None:
    """Returns why a column that should hold messages cannot be read: it is a text that is not JSON. None if it can."""
    for ours in ("messages", "conversations"):
        column = (columns or {}).get(ours, ours)
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            continue
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "unreadable"
            why = pythons_quotes(text) or f"{where}; a text there must be the JSON of a list"
            return f"{column!r} is not JSON: {why}"
    return None


def wrong_separator(header: list[str], separator: str) -> str | None:
    """Returns which separator a table seems to have if its header is one column when split at ``separator``."""
    if len(header) != 1:
        return None
    name, count = max(((name, header[0].count(each)) for each, name in _SEPARATORS.items()), key=lambda pair: pair[1])
    if not count or name == _SEPARATORS[separator]:
        return None
    cure = {"tabs": "name it .tsv", "commas": "name it .csv"}.get(name, "save it with commas (.csv) or tabs (.tsv)")
    return f"the header is one column, {header[0][:60]!r}, and seems to be separated by {name}; {cure}"
