"""Read files into rows, one after the other: (line, row, fault).

Only ``.json`` files are held in memory, because they have no rows before their last bracket. JSONL is deliberately not
turned into an Arrow table. Arrow gives every struct of a column the same fields, so that each tool call would get the
arguments of all others (as nulls), and its parser knows neither the line nor the column of a fault. Reading JSONL again
line by line costs 10 to 20 microseconds a row and no memory, which is what memory-mapping is for. Parquet is Arrow
already: it is memory-mapped and read batch by batch, and the nulls that it had to fill in are removed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qlora_sft.data.misread import (
    HEAD,
    check_beginning,
    half_character,
    list_in_a_line,
    no_lines_of_json,
    pythons_quotes,
    rows_in_a_text,
    wrong_separator,
)
from qlora_sft.errors import DataError, first_line
from qlora_sft.json_types import JsonObject

Rows = Iterator[tuple[int, Any, str | None]]
"""Yields the line (or number) of a row, the row, and None; or the line, None, and what is wrong with it."""


def read_rows(path: Path) -> Rows:
    """Yields every row of a file of any known kind.

    Raises `DataError` with file and cure if it cannot be read at all.
    """
    reader = READERS.get(kind_of(path))
    if reader is None:
        known = ", ".join(READERS)
        raise DataError(f"{path}: unknown kind of file; known are {known}, and .gz or .zst behind them. Rename it.")
    with readable(path):
        if reader is not _parquet:
            with _open(path) as file:
                check_beginning(path, file.read(64))
        yield from reader(path)


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Raises a `DataError` with the cure where its body cannot read the file ``path``, which was found before."""
    try:
        yield
    except FileNotFoundError:
        cure = "put it back, and run the same command again"
        raise DataError(f"{path}: the file was removed or renamed after it had been found; {cure}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error}); copy or download it again") from None
    except PermissionError:
        raise DataError(f"{path}: may not be read; change its permissions") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); copy or download it again") from None


def kind_of(path: Path) -> str:
    """Returns the ending that says how to read a file: ``.jsonl`` for ``a.jsonl.gz``."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in (".gz", ".zst"):
        # A Parquet file is compressed inside; around it there is nothing to memory-map.
        return endings[-2] if len(endings) > 1 and endings[-2] != ".parquet" else endings[-1]
    return endings[-1] if endings else ""


def text_layout(path: Path) -> str:
    """Returns how a .txt file separates its documents: ``blank lines`` if text stands on both sides of one, else
    ``lines``.

    One document per line is what corpora of raw text usually are; blank lines are the only sign of the other habit.
    """
    texts = gap = 0
    with _open(path) as file:
        for raw in file:
            if raw.strip():
                if texts and gap:
                    return "blank lines"
                texts += 1
            else:
                gap += 1
    return "lines"


# ------------------------------------------------------------------ one reader per kind


def _jsonl(path: Path) -> Rows:
    first = True
    with _open(path) as file:
        for line, text, fault in _decoded(file):
            if fault is not None:
                yield line, None, fault
            elif text.strip():
                row, fault = _parsed(text)
                if first:
                    _check_first_line(path, row, fault)
                first = False
                yield line, row, fault


def _parsed(text: str) -> tuple[object, str | None]:
    """Returns the row and None, or None and what is wrong with it."""
    try:
        row = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        why = pythons_quotes(text) or f"{error.msg} at column {error.colno}"
        return None, f"not valid JSON ({why}); one object per line"
    except RecursionError:
        return None, "not valid JSON (nested too deep); one object per line"
    except ValueError as error:  # a key that stands twice, a number of thousands of digits
        return None, f"not valid JSON ({error})"
    broken = half_character(row) if "\\ud" in text.lower() else None
    return (None, broken) if broken else (row, None)


def _each_key_once(pairs: list[tuple[str, object]]) -> JsonObject:
    """Returns the pairs as a dict. Raises ValueError for two equal keys, of which JSON's
    parser would keep the last in silence."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return fields


def _check_first_line(path: Path, row: object, fault: str | None) -> None:
    """Raises `DataError` if the first line shows that the file as a whole is not JSON Lines."""
    why = list_in_a_line(row)
    if fault is not None:
        with _open(path) as file:
            why = no_lines_of_json(file.read(HEAD).decode("utf-8", "ignore"), kind_of(path))
    if why:
        raise DataError(f"{path}: {why}")


def _json(path: Path) -> Rows:
    """Yields the rows of a list, or of an object with one list of them; rows are counted from 1."""
    with _open(path) as file:
        content = file.read()
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); re-save it as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and len(content.splitlines()) > 1:
            # JSON Lines under the wrong ending, which is common.
            yield from _jsonl(path)
            return
        where = f"{error.msg} at column {error.colno}"
        why = pythons_quotes(content[:200].decode("utf-8", "ignore")) or where
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({why}); expected a list of rows") from None
    except RecursionError:
        raise DataError(f"{path}: not valid JSON (nested too deep); expected a list of rows") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if {"messages", "conversations"} & set(lists):
            value = [value]
        elif len(lists) == 1:
            value = value[lists[0]]
        else:
            if value and all(isinstance(item, dict) and item.keys() for item in value.values()):
                cure = "its rows as objects (pandas: to_json(..., orient='records', lines=True))"
                raise DataError(f"{path}: it is a table by columns, {', '.join(map(repr, value))}; write {cure}")
            found = ", ".join(map(repr, lists)) or "none"
            raise DataError(f"{path}: expected a list of rows or an object with one list; lists in it: {found}")
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of rows, got a {type(value).__name__}")
    escaped = b"\\ud" in content.lower()
    for number, row in enumerate(value, start=1):
        broken = half_character(row) if escaped else None
        yield (number, None, broken) if broken else (number, row, None)


def _csv(path: Path) -> Rows:
    """Yields one row per record, with columns named by the first.

    The line of a row is where it begins, because a quoted text may have many lines.
    """
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    with _open(path) as file:
        lines = _good_lines(path, file)
        reader = csv.reader(lines, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            if why := wrong_separator(header, reader.dialect.delimiter):
                raise DataError(f"{path}:1: {why}")
            if len(set(header)) < len(header):
                raise DataError(f"{path}:1: two columns of one name in {', '.join(header)}; rename one")
            begin = reader.line_num + 1
            for record in reader:
                if len(record) == len(header):
                    yield begin, dict(zip(header, record, strict=True)), None
                elif record:
                    fault = f"{len(record)} fields where the header has {len(header)}; quote texts with separators"
                    yield begin, None, fault
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}); check the quotes") from None


def _text(path: Path) -> Rows:
    """Yields documents as `text_layout` separates them, each with the line in which it begins."""
    by_line = text_layout(path) == "lines"
    with _open(path) as file:
        begin, collected = 0, []
        for line, text in enumerate(_good_lines(path, file), start=1):
            if text.strip():
                if not begin and line == 1 and (why := rows_in_a_text(text)):
                    raise DataError(f"{path}: {why}")
                begin = begin or line
                collected.append(text)
            if collected and (by_line or not text.strip()):
                yield begin, {"text": "".join(collected).rstrip("\r\n")}, None
                begin, collected = 0, []
        if collected:
            yield begin, {"text": "".join(collected).rstrip("\r\n")}, None


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(row), None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a Parquet file or damaged ({first_line(error)}); download it again") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
}


def without_nulls(value: object) -> object:
    """Returns the value without its null fields.

    Arrow cannot tell them from absent ones, and has filled most of them in.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------ bytes and text


def _open(path: Path) -> IO[bytes]:
    ending = path.suffix.lower()
    if ending == ".gz":
        return io.BufferedReader(gzip.open(path))
    if ending == ".zst":
        # Python 3.11 has no zstd; Arrow, which `datasets` needs anyway, brings it.
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _decoded(file: IO[bytes]) -> Iterator[tuple[int, str, str | None]]:
    """Yields lines as text, each decoded alone, so that a wrong byte is found in its line."""
    for line, raw in enumerate(file, start=1):
        try:
            yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8"), None
        except UnicodeDecodeError as error:
            yield line, "", f"not UTF-8 text ({error.reason} at byte {error.start} of the line); re-save it as UTF-8"


def _good_lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Yields lines as text. Raises `DataError` at the first one that is faulty."""
    for line, text, fault in _decoded(file):
        if fault:
            raise DataError(f"{path}:{line}: {fault}")
        yield text
