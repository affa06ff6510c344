"""Name the types of values that come from JSON, YAML or a user's table, and read the objects that files hold."""

from __future__ import annotations

import json
from pathlib import Path

JsonObject = dict[str, object]
"""A JSON object whose values nobody has checked yet; each must be narrowed by isinstance before it is used."""
JsonList = list[object]
"""A JSON list whose items nobody has checked yet."""


def read_object(file: Path) -> JsonObject:
    """Reads the JSON object in ``file``. Raises OSError, or ValueError for any other content."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds {'null' if content is None else type(content).__name__}, not an object")
    return content
