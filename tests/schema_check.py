"""The part of JSON Schema that the schema of a configuration uses, so that it is tried as an editor would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "integer": (int,),
    "number": (int, float), "null": (type(None),),
}  # fmt: skip
KNOWN = {
    "$schema", "title", "description", "default", "type", "enum", "anyOf", "properties", "required", "items",
    "additionalProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Every place where ``value`` is not as ``schema`` has it."""
    assert schema.keys() <= KNOWN, "a keyword that is not checked here"
    if "anyOf" in schema and all(any(faults(value, each)) for each in schema["anyOf"]):
        yield f"{where}: {value!r} is none of what is allowed"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not in {schema['enum']}"
    if "type" in schema:
        right = isinstance(value, TYPES[schema["type"]])
        if not right or (isinstance(value, bool) and schema["type"] in ("integer", "number")):
            yield f"{where}: {value!r} is no {schema['type']}"
            return
    yield from _out_of_bounds(value, schema, where)
    yield from (f"{where}: {name} is missing" for name in schema.get("required", []) if name not in value)
    inner, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in value.items() if isinstance(value, dict) else ():
        if name not in inner and other is False:
            yield f"{where}.{name}: unknown"
        elif name in inner or isinstance(other, dict):
            yield from faults(item, inner.get(name, other), f"{where}.{name}")
    for number, item in enumerate(value) if isinstance(value, list) else ():
        yield from faults(item, schema.get("items", {}), f"{where}.{number}")


def _out_of_bounds(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    bounds = {
        "minimum": lambda bound: value >= bound, "maximum": lambda bound: value <= bound,
        "exclusiveMinimum": lambda bound: value > bound, "exclusiveMaximum": lambda bound: value < bound,
    }  # fmt: skip
    yield from (
        f"{where}: {value} ({name})" for name, good in bounds.items() if name in schema and not good(schema[name])
    )
