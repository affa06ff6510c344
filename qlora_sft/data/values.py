"""Read what stands in a cell or under a key: whether it holds anything, and what its JSON says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_sft.data.misread import half_character, pythons_quotes
from qlora_sft.errors import DataError
from qlora_sft.json_types import JsonObject

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""All of these mean that there is nothing. Arrow and CSV cannot leave a field out, so they fill in one of them."""


def from_json_text(value: object, what: str) -> object:
    """Returns what a JSON text says (CSV and Parquet files hold lists that way); anything but a text as it is.

    Raises `DataError`.
    """
    if not isinstance(value, str):
        return value
    try:
        content = json.loads(value)
    except json.JSONDecodeError as error:
        why = pythons_quotes(value) or f"{error.msg} at column {error.colno}"
        raise DataError(f"{what} is not valid JSON ({why}): {short(value)}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{what} is not valid JSON (nested too deep, or a number without end)") from None
    if broken := half_character(content) if "\\ud" in value.lower() else None:
        raise DataError(f"{what} holds {broken}")
    return content


def anything(value: object, what: str) -> object:
    """Returns the value, or what its JSON text says; None for all that means nothing,
    also as a text (``[]``, ``null``)."""
    if isinstance(value, str) and not value.strip():
        return None
    value = from_json_text(value, what)
    return None if value in EMPTY else value


def only(fields: Mapping[str, object], *keys: str) -> object:
    """Returns the value of the one key that holds something; None if none does.

    Raises `DataError` if two hold different things, since one of them would be lost.
    """
    found = {key: fields[key] for key in keys if fields.get(key) not in EMPTY}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise DataError(f"{' and '.join(map(repr, found))} say different things: {short(fields)}; keep one")
    return values[0] if values else None


def joined(inner: Mapping[str, object], outer: Mapping[str, object]) -> JsonObject:
    """Returns both in one; an empty field is filled from the other. Raises `DataError`
    where both hold different things."""
    result = dict(inner)
    for key, value in outer.items():
        if result.get(key) in EMPTY:
            result[key] = value
        elif value not in EMPTY and value != result[key]:
            raise DataError(f"{key!r} is given twice: {short(result[key])} and {short(value)}; keep one")
    return result


def idle_keys(fields: Mapping[str, object], known: set[str], what: str) -> set[str]:
    """Returns ``what 'key'`` for every key that holds something and is none of the known ones."""
    return {f"{what} {key!r}" for key in fields.keys() - known if fields[key] not in EMPTY}


def without(fields: Mapping[str, object], keys: set[str]) -> JsonObject:
    """Returns the fields without ``keys``."""
    return {key: value for key, value in fields.items() if key not in keys}


KINDS: dict[type, str] = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}


def kind(value: object) -> str:
    """Returns what kind of value it is, for messages, in JSON's words and not in Python's."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    return KINDS.get(type(value), f"a {type(value).__name__}")


def short(value: object) -> str:
    """Returns the value as a text of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
