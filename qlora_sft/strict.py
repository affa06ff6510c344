"""Build dataclasses strictly from YAML and ``key.sub=value``.

Unknown keys, wrong types, numbers out of range and missing values are noted, each with its file, its key and the
nearest valid name. None of them is raised here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from typing import Annotated, Any, Literal

from qlora_sft.json_types import JsonObject
from qlora_sft.ranges import Range
from qlora_sft.yaml_text import YamlFault, read_yaml


def apply_override(tree: JsonObject, override: str, origin: dict[str, str], problems: list[str]) -> None:
    """Writes ``a.b.0.c=value`` into the nested tree; list items are addressed by their index."""
    key, equals, text = override.lstrip("-").partition("=")
    source = f"override {override!r}"
    if not equals or not key:
        problems.append(f"{source}: expected key.sub=value")
        return
    try:
        value = read_yaml(text) if text else None
    except YamlFault as fault:
        problems += [f"{source}: {what}" for _, what in fault.faults]
        return
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
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
    """Returns the dataclass ``kind`` made from ``tree``; None, with the problems noted, if anything in it is wrong."""
    fields = {key_of(f.name): f for f in dataclasses.fields(kind)}
    hints = _hints(kind)
    before = len(problems)
    values: JsonObject = {}
    for key, value in tree.items():
        where = f"{prefix}{key}"
        if key not in fields:
            problems.append(f"{origin.get(where, file)}: unknown key {where!r}{did_you_mean(str(key), fields)}")
            continue
        values[fields[key].name] = _convert(hints[key], value, where, file, origin, problems)
    for name, f in fields.items():
        if name not in tree and f.default is MISSING and f.default_factory is MISSING:
            problems.append(f"{file}: missing key {prefix + name!r}")
    return kind(**values) if len(problems) == before else None


def key_of(name: str) -> str:
    """Returns the key of a field: a word of Python's own, as ``from``, has an underscore behind it in the dataclass."""
    return name.rstrip("_")


def _hints(kind: type) -> JsonObject:
    return {key_of(name): hint for name, hint in typing.get_type_hints(kind, include_extras=True).items()}


def as_tree(value: object) -> object:
    """Returns what `build` reads back to an equal dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key_of(f.name): as_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: as_tree(each) for key, each in value.items()}
    return [as_tree(each) for each in value] if isinstance(value, list) else value


def build_rest(kind: Any, tree: Any) -> Any:
    """Returns the dataclass ``kind`` made from what is right in ``tree``; None if a key
    that it needs is wrong or missing."""
    values: JsonObject = {}
    hints = _hints(kind)
    names = {key_of(f.name): f.name for f in dataclasses.fields(kind)}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if key in hints:
            found: list[str] = []
            converted = _convert(hints[key], value, "", "", {}, found)
            options = (hints[key], *typing.get_args(hints[key]))
            sections = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
            if found and sections and isinstance(value, list):
                converted = [item for item in (build_rest(sections[0], each) for each in value) if item is not None]
            elif found:
                converted = build_rest(sections[0], value) if sections else None
            if not found or converted is not None:
                values[names[key]] = converted
    try:
        return kind(**values)
    except TypeError:
        return None


def _convert(hint: object, value: object, where: str, file: str, origin: dict[str, str], problems: list[str]) -> object:
    """Returns ``value`` as the type ``hint`` has it; None, with the problem noted, if it is of no such type."""
    source = origin.get(where, file)
    options = options_of(hint)
    lists = [option for option in options if typing.get_origin(option) is list]
    if isinstance(value, list) and lists:
        (item,) = typing.get_args(lists[0])
        return [_convert(item, v, f"{where}.{i}", file, origin, problems) for i, v in enumerate(value)]
    sections = [option for option in options if dataclasses.is_dataclass(option)]
    if isinstance(value, dict) and sections:
        return build(sections[0], value, where + ".", file, origin, problems)
    for option in options:
        bare, limits = bare_type(option)
        if _matches(bare, value):
            fault = limits.fault(value) if limits and isinstance(value, int | float) else ""
            if fault:
                problems.append(f"{source}: {where} {fault}")
            return float(value) if bare is float and not fault and isinstance(value, int) else value
    choices = [c for option in options if typing.get_origin(option) is Literal for c in typing.get_args(option)]
    hint_text = did_you_mean(str(value), choices) if choices else ""
    expected = " or ".join(_describe(bare_type(option)[0]) for option in options)
    shown = kind_of(value) if sections else _short(value)
    hint_text = hint_text or _number_hint(value, [bare_type(option)[0] for option in options])
    problems.append(f"{source}: {where} must be {expected}, got {shown}{hint_text}")
    return None


def options_of(hint: object) -> tuple[object, ...]:
    """Returns the types that ``hint`` allows: those of a union, or ``hint`` itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def bare_type(option: object) -> tuple[object, Range | None]:
    """Returns the type without its annotation, and the range that the annotation gives."""
    if typing.get_origin(option) is not Annotated:
        return option, None
    bare, *extras = typing.get_args(option)
    return bare, next((extra for extra in extras if isinstance(extra, Range)), None)


def ranges(kind: type) -> Iterator[tuple[str, object, Range | None]]:
    """Yields name, type and range of every field of the dataclass ``kind`` that is a number (or empty)."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        options = options_of(hint)
        for bare, limits in map(bare_type, options):
            if bare in (int, float):
                yield name, bare, limits


def range_faults(section: object) -> Iterator[tuple[str, str]]:
    """Yields name and fault of every number of the dataclass ``section`` that is out of its range."""
    for name, _, limits in ranges(type(section)):
        value = getattr(section, name)
        fault = limits.fault(value) if limits and value is not None else ""
        if fault:
            yield name, fault


def _matches(option: object, value: object) -> bool:
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


def did_you_mean(name: str, names: typing.Iterable[object]) -> str:
    """Returns a hint at the name that is closest to ``name``, or an empty text if none is close."""
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _describe(option: object) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    if typing.get_origin(option) is list:
        return "a list"
    if typing.get_origin(option) is dict:
        return "a section of texts"
    if dataclasses.is_dataclass(option):
        return "a section with keys"
    names: dict[object, str] = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "empty",
    }
    return names.get(option, str(option))


def _number_hint(value: object, options: Sequence[object]) -> str:
    """Returns why YAML took a text that looks like a number for a text, where a number is wanted."""
    if not isinstance(value, str) or not {int, float} & set(options):
        return ""
    if re.fullmatch(r"[-+]?0[0-9_]+", value):
        return f" (a number that begins with 0 is octal to some and decimal to others; write {value.lstrip('+-0_')})"
    if re.fullmatch(r"[-+]?[0-9]+(:[0-9]+)+", value):
        return " (a number with colons is in base 60 to some; write it out)"
    return " (without quotes)" if re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value) else ""


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of many digits"
    text = repr(value) if not isinstance(value, list | dict) else kind_of(value)
    return text if len(text) <= 80 else text[:77] + "..."


def kind_of(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    names: dict[type, str] = {
        dict: "a section", list: "a list", str: "a text", int: "a number", float: "a number", type(None): "nothing"
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")
