"""Check that what was read from JSON is what its type says, before it is drawn."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping

from qlora_sft.json_types import number


def first_wrong(value: object, hint: object, name: str) -> str | None:
    """Returns what is wrong with the first value that its type does not allow; None if all are right.

    hint: the type; name: how the value is called. A number that is missing or not finite is as wrong as a text.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        faults = [first_wrong(value, option, name) for option in arguments]
        return None if None in faults else faults[0]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _of_fields(value, hint, name)
    if origin is typing.Literal:
        return None if value in arguments else f"{name} is {value!r}"
    if origin is list and isinstance(value, list):
        return next((wrong for each in value if (wrong := first_wrong(each, arguments[0], name))), None)
    if origin is dict and isinstance(value, Mapping):
        faults = [first_wrong(each, arguments[1], f"{name}.{key}") for key, each in value.items()]
        return next(filter(None, faults), None)
    if hint in (int, float):
        return None if number(value) is not None else f"{name} is {value!r}, not a number"
    return None if isinstance(hint, type) and isinstance(value, hint) else f"{name} is {value!r}"


def _of_fields(value: object, hint: type, name: str) -> str | None:
    if not isinstance(value, hint):
        return f"{name} is {value!r}"
    hints = typing.get_type_hints(hint)
    faults = (
        first_wrong(getattr(value, each.name), hints[each.name], f"{name}.{each.name}")
        for each in dataclasses.fields(value)  # type: ignore[arg-type]
    )
    return next(filter(None, faults), None)
