"""Name the types of values that come from JSON, YAML or a user's table."""

from __future__ import annotations

JsonObject = dict[str, object]
"""A JSON object whose values nobody has checked yet; each must be narrowed by isinstance before it is used."""
JsonList = list[object]
"""A JSON list whose items nobody has checked yet."""
