"""Text into dataclasses, strictly: YAML and ``key.sub=value``; unknown keys, wrong types, missing values.

Every problem is noted, none raised, each with its file, its key and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import MISSING
from typing import Any, Literal

import yaml


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``2e-4`` as a string, because it has no dot, and ``on`` and ``off`` as true and false; people mean
    the number, and the words."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def apply_override(tree: dict[str, Any], override: str, origin: dict[str, str], problems: list[str]) -> None:
    """``a.b.0.c=value`` into the nested tree; list items are addressed by their index."""
    key, equals, text = override.lstrip("-").partition("=")
    source = f"override {override!r}"
    if not equals or not key:
        problems.append(f"{source}: expected key.sub=value")
        return
    try:
        value = yaml.load(text, Loader) if text else None
    except yaml.YAMLError as error:
        problems.append(f"{source}: not a YAML value: {one_line(error)}")
        return
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                where = ".".join(parts[:depth])
                problems.append(f"{source}: {where} has {len(node)} items, counted from 0; there is no {part!r}")
                return
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            problems.append(f"{source}: {'.'.join(parts[:depth])} is {kind_of(node)}, it has no {part!r}")
            return
        if last:
            node[index] = value
            origin[key] = source
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]


def build(kind: Any, tree: dict[Any, Any], prefix: str, file: str, origin: dict[str, str], problems: list[str]) -> Any:
    """Dataclass ``kind`` from ``tree``; None (with problems noted) if anything in it is wrong."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    before = len(problems)
    values: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{prefix}{key}"
        if key not in fields:
            problems.append(f"{origin.get(where, file)}: unknown key {where!r}{did_you_mean(str(key), fields)}")
            continue
        values[key] = _convert(hints[key], value, where, file, origin, problems)
    for name, f in fields.items():
        if name not in tree and f.default is MISSING and f.default_factory is MISSING:
            problems.append(f"{file}: missing key {prefix + name!r}")
    return kind(**values) if len(problems) == before else None


def _convert(hint: Any, value: Any, where: str, file: str, origin: dict[str, str], problems: list[str]) -> Any:
    source = origin.get(where, file)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    lists = [option for option in options if typing.get_origin(option) is list]
    if isinstance(value, list) and lists:
        (item,) = typing.get_args(lists[0])
        return [_convert(item, v, f"{where}.{i}", file, origin, problems) for i, v in enumerate(value)]
    sections = [option for option in options if dataclasses.is_dataclass(option)]
    if isinstance(value, dict) and sections:
        return build(sections[0], value, where + ".", file, origin, problems)
    for option in options:
        if _matches(option, value):
            return float(value) if option is float else value
    choices = [c for option in options if typing.get_origin(option) is Literal for c in typing.get_args(option)]
    hint_text = did_you_mean(str(value), choices) if choices else ""
    expected = " or ".join(_describe(option) for option in options)
    shown = kind_of(value) if sections else repr(value)
    problems.append(f"{source}: {where} must be {expected}, got {shown}{hint_text}")
    return None


def _matches(option: Any, value: Any) -> bool:
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option)
    if option is type(None):
        return value is None
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(option) is dict:
        return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)
    return isinstance(option, type) and isinstance(value, option)


def did_you_mean(name: str, names: typing.Iterable[Any]) -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    if typing.get_origin(option) is list:
        return "a list"
    if typing.get_origin(option) is dict:
        return "a section of texts"
    if dataclasses.is_dataclass(option):
        return "a section with keys"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}
    return names.get(option, str(option))


def kind_of(value: Any) -> str:
    names = {dict: "a section", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
