"""JSONL files of conversations -> plain dicts, each fault with its file, line and cure."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qlora_sft.config import SourceConfig
from qlora_sft.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# After so many faults the file as a whole is wrong, and a longer list helps nobody.
MAX_PROBLEMS = 10

Conversation = dict[str, Any]
"""``messages``: list of {role, content, reasoning?, tool_calls?, name?, train?, weight?}; ``tools``?;
``chat_template_kwargs``?; ``line``: where it stood in its file."""


@dataclass(frozen=True)
class Source:
    """The conversations of one file."""

    name: str
    path: Path
    rows: list[Conversation]


def read_sources(sources: list[SourceConfig], seed: int) -> list[Source]:
    """Every source's conversations. All faulty files are reported at once, in one `DataError`."""
    result, problems = [], []
    for source in sources:
        try:
            path = resolve_path(source.path)
            result.append(Source(source.name or path.stem, path, _read(path, source.max_rows, seed)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return result


def resolve_path(path: str) -> Path:
    """``demo:train/fields.jsonl`` names a file of the generated demo data; anything else is a path."""
    if path.startswith("demo:"):
        from qlora_sft.demo import data_path

        return data_path() / path.removeprefix("demo:")
    return Path(path).expanduser()


def _read(path: Path, max_rows: int | None, seed: int) -> list[Conversation]:
    """All conversations of one file, or ``max_rows`` of them drawn with ``seed``, in the file's order.

    Raises `DataError` naming file, line and cure; up to ten faults at once.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file{_similar_file(path)}. Check data sources in the configuration.")
    rows, problems = [], []
    for line, text in _numbered_lines(path):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{line}: not valid JSON ({error.msg} at column {error.colno}); one object per line")
            row = None
        if row is not None:
            fault = _fault(row)
            if fault is None:
                rows.append({**row, "line": line})
            else:
                problems.append(f"{path}:{line}: {fault}")
        if len(problems) == MAX_PROBLEMS:
            problems.append(f"{path}: stopped after {MAX_PROBLEMS} faults")
            break
    if problems:
        raise DataError("\n".join(problems))
    if not rows:
        raise DataError(f"{path}: the file has no conversations; expected one JSON object with 'messages' per line")
    if max_rows is not None and max_rows < len(rows):
        keep = sorted(random.Random(seed).sample(range(len(rows)), max_rows))
        rows = [rows[i] for i in keep]
    return rows


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); re-save it as UTF-8") from None


def _fault(row: Any) -> str | None:
    """What is wrong with one row, with the cure; None if nothing is."""
    if not isinstance(row, dict):
        return f"expected an object with 'messages', got a {type(row).__name__}"
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(map(repr, row)) or "no keys"
        return f"expected a list 'messages' with at least one message, found {keys}"
    for index, message in enumerate(messages):
        fault = _message_fault(message)
        if fault:
            return f"message {index}: {fault}"
    if not any(message["role"] == "assistant" for message in messages):
        return "no assistant turn, so nothing could be trained; add one or remove the line"
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if row.get(key) is not None and not isinstance(row[key], kind):
            return f"{key!r} must be a {kind.__name__}, got a {type(row[key]).__name__}"
    return None


def _message_fault(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"expected an object with 'role' and 'content', got a {type(message).__name__}"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        close = get_close_matches(str(role), ROLES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(ROLES)}"
        return f"unknown role {role!r}; {hint}"
    if calls is not None and role != "assistant":
        return f"only an assistant may have tool_calls, this is a {role} message"
    if calls is not None:
        fault = _calls_fault(calls)
        if fault:
            return fault
    if content is None and calls:
        return None
    if not isinstance(content, str):
        return f"'content' must be a text, got {'nothing' if content is None else 'a ' + type(content).__name__}"
    if role == "assistant" and not content and not calls:
        return "an assistant turn with neither content nor tool_calls"
    for key, kind in (("reasoning", str), ("train", bool), ("weight", (int, float))):
        if message.get(key) is not None and not isinstance(message[key], kind):  # type: ignore[arg-type]
            return f"{key!r} has the wrong type: {message[key]!r}"
    if message.get("weight") is not None and not message["weight"] >= 0:
        return f"'weight' must not be negative, got {message['weight']}"
    return None


def _calls_fault(calls: Any) -> str | None:
    if not isinstance(calls, list) or not calls:
        return "'tool_calls' must be a list with at least one call"
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "a tool call needs a function with a 'name' and 'arguments'"
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                json.loads(arguments)
            except json.JSONDecodeError:
                return f"the arguments of {function['name']!r} are not valid JSON: {arguments!r}"
        elif not isinstance(arguments, dict):
            return f"the arguments of {function['name']!r} must be an object or JSON text"
    return None


def _similar_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent} either)"
    close = get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1, cutoff=0.5)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
