"""Name the types of values that come from JSON, YAML or a user's table, and read the objects that files hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

JsonObject = dict[str, object]
"""A JSON object whose values nobody has checked yet; each must be narrowed by isinstance before it is used."""
JsonList = list[object]
"""A JSON list whose items nobody has checked yet."""


def read_object(file: Path) -> JsonObject:
    """Reads the JSON object in ``file``. Raises OSError, or ValueError for any other content."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds {'null' if content is None else type(content).__name__}, not an object")
    return content


def whole_lines(file: Path) -> list[JsonObject]:
    """Reads a file of JSON objects, one a line, without lines that are damaged; none where there is no such file."""
    rows: list[JsonObject] = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            rows += [row] if isinstance(row, dict) else []
    return rows


def number(value: object) -> float | None:
    """Returns ``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def mapping(value: object) -> JsonObject:
    """Returns ``value`` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> JsonList:
    """Returns ``value`` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def numbers(value: object) -> dict[str, float]:
    """Returns what is a finite number in the object ``value``, by its key."""
    return {key: found for key, each in mapping(value).items() if (found := number(each)) is not None}
