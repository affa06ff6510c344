"""Write the reference of all settings from the schema itself: a page for people and a JSON schema for editors.

``python -m qlora_sft.reference`` writes ``docs/config.md`` and ``recipes/schema.json`` anew. The meaning of a key is
the docstring under its field; type, default and range are those that the loader checks.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from qlora_sft.config import RECIPES, Config
from qlora_sft.json_types import JsonObject
from qlora_sft.ranges import Range
from qlora_sft.strict import bare_type, key_of, options_of

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
SCHEMA = RECIPES / "schema.json"

INTRODUCTION = """\
# Settings

Generated from the schema by `python -m qlora_sft.reference`; a test fails if the two differ.

A configuration is a YAML file with the keys below. On the command line, `key.sub=value` replaces a value of the file
(`training.learning_rate=1e-4`); an item of a list is addressed by its index, counted from 0
(`data.train.0.max_rows=50`). A key that is not listed here, a value of another type and a number outside of its range
are errors. A key whose default is empty may be left out or be `null`.

Editors that read YAML schemas complete and check these keys if a file begins with a line like that of the shipped
recipes, `# yaml-language-server: $schema=schema.json`, with the path of `qlora_sft/recipes/schema.json`;
`qlora-sft new` writes that line.
"""


@dataclass(frozen=True)
class Key:
    """Describes one key of a section, as the schema has it."""

    name: str
    hint: object
    default: object
    """MISSING for a key that must be given."""
    meaning: str


def keys_of(kind: type) -> list[Key]:
    """Returns the keys of the dataclass ``kind`` in their order."""
    hints, meanings = typing.get_type_hints(kind, include_extras=True), _docstrings(kind)
    keys = []
    for each in dataclasses.fields(kind):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        meaning = meanings.get(each.name) or _of_section(hints[each.name])
        keys.append(Key(key_of(each.name), hints[each.name], default, " ".join(meaning.split())))
    return keys


def section_of(hint: object) -> type | None:
    """Returns the dataclass that a key holds, alone or in a list; None for any other key."""
    for option in options_of(hint):
        inner = typing.get_args(option)[0] if typing.get_origin(option) is list else option
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            return inner
    return None


def _of_section(hint: object) -> str:
    """Returns the docstring of a section, which is the meaning of its key where the field has none of its own."""
    section = section_of(hint)
    return (section.__doc__ or "").partition("\n\n")[0] if section else ""


def _docstrings(kind: type) -> dict[str, str]:
    """Returns the docstring under each field of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        module = ast.parse(inspect.getsource(sys.modules[each.__module__]))
        (body,) = (node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == each.__name__)
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found[field.target.id] = ast.literal_eval(below.value)
    return found


# ------------------------------------------------------------------ the page


def page() -> str:
    """Returns the text of ``docs/config.md``."""
    return "\n".join([INTRODUCTION, *_sections("", Config, listed=False)])


def _sections(path: str, kind: type, listed: bool) -> Iterator[str]:
    """Yields the section of ``kind`` and then those inside of it."""
    yield f"## {f'`{path}`' if path else 'The whole file'}\n"
    doc = _markdown(" ".join((kind.__doc__ or "").split()))
    yield f"{'A list, every item with these keys. ' if listed else ''}{doc}\n"
    own = {key_of(name) for name in kind.__annotations__}
    keys = [key for key in keys_of(kind) if key.name in own]
    if len(own) < len(dataclasses.fields(kind)):
        yield "It has all keys of [`data.held_out`](#dataheld_out), and:\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    yield "\n".join(_line(path, key) for key in keys) + "\n"
    for key in keys:
        inner = section_of(key.hint)
        if inner:
            yield from _sections(_joined(path, key.name), inner, listed=typing.get_origin(key.hint) is list)


def _line(path: str, key: Key) -> str:
    inner = section_of(key.hint)
    name = f"`{key.name}`"
    if inner:
        name = f"[{name}](#{_joined(path, key.name).replace('.', '')})"
    kind = " or ".join(_described(option) for option in options_of(key.hint) if option is not type(None))
    return f"| {name} | {kind} | {_default(key)} | {_markdown(key.meaning)} |".replace("  ", " ")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", r"\|")


def _default(key: Key) -> str:
    if key.default is MISSING:
        return "must be given"
    if dataclasses.is_dataclass(key.default):
        return "its defaults"
    if key.default is None or key.default == []:
        return "empty"
    shown = str(key.default).lower() if isinstance(key.default, bool) else key.default
    return f"`{shown}`"


def _described(option: object) -> str:
    kind, limits = bare_type(option)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin is list:
        return "list of sections" if section_of(kind) else "list of texts"
    if origin is dict:
        return "section of texts"
    if section_of(kind):
        return "section"
    name = {str: "text", bool: "`true`, `false`", int: "whole number", float: "number"}[typing.cast(type, kind)]
    return name + (f" {_range(limits)}" if limits else "")


def _range(limits: Range) -> str:
    low, high = (f"{int(x):,}" if x == int(x) else f"{x:g}" for x in (limits.low, limits.high))
    return f"{'above' if limits.above else 'from'} {low} {'to below' if limits.below else 'to'} {high}"


# ------------------------------------------------------------------ the JSON schema


def json_schema() -> JsonObject:
    """Returns a JSON schema (draft 7) of a configuration."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A run of qlora-sft", **_object(Config)}


def _object(kind: type) -> JsonObject:
    keys = keys_of(kind)
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [key.name for key in keys if key.default is MISSING],
        "properties": {key.name: _property(key) for key in keys},
    }


def _property(key: Key) -> JsonObject:
    options = [_option(option) for option in options_of(key.hint)]
    shape = options[0] if len(options) == 1 else {"anyOf": options}
    plain = key.default is not MISSING and key.default is not None and not dataclasses.is_dataclass(key.default)
    default = {"default": key.default} if plain else {}
    return {"description": key.meaning.replace("``", ""), **default, **shape}


def _option(option: object) -> JsonObject:
    kind, limits = bare_type(option)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return {"enum": list(arguments)}
    if typing.get_origin(kind) is list:
        return {"type": "array", "items": _option(arguments[0])}
    if typing.get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": {"type": "string"}}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _object(kind)
    names: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return {"type": names[kind], **(_bounds(limits) if limits else {})}


def _bounds(limits: Range) -> JsonObject:
    return {
        "exclusiveMinimum" if limits.above else "minimum": limits.low,
        "exclusiveMaximum" if limits.below else "maximum": limits.high,
    }


def schema_text() -> str:
    """Returns the text of ``recipes/schema.json``."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {PAGE} and {SCHEMA}")
