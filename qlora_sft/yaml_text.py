"""Read YAML as people mean it, into nested dicts and lists in which nothing is replaced, shared or reinterpreted.

YAML 1.1, which PyYAML reads, has surprises that cost a run. Of two equal keys the first is lost in silence; ``2e-4`` is
a text, ``on`` is true, ``0512`` is 330 and ``1:30`` is 90. Two uses of an anchor are one object, so that an override of
one changes both.
"""

from __future__ import annotations

import re

import yaml
from yaml.nodes import MappingNode, ScalarNode

# Far more than a configuration has; anchors inside anchors can make billions of a few lines.
_MOST_VALUES = 100_000
_WHOLE = r"(0|[1-9][0-9_]*)"
# Kind of value -> the texts that are one, and their first characters.
_PLAIN = {
    "bool": (r"true|True|false|False", "tTfF"),
    "int": (rf"[-+]?{_WHOLE}|[-+]?0x[0-9a-fA-F_]+", "-+0123456789"),
    "float": (
        rf"[-+]?({_WHOLE}\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?{_WHOLE}[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
# A date is a text here, and so is a lone "=".
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in (*_PLAIN, "timestamp", "value")}


class YamlFault(ValueError):
    """Says what is wrong with a YAML text.

    ``faults`` holds pairs of a line (or 0) and what is wrong there. ``tree`` is the content if the only faults are keys
    that stand twice; the last of each counts.
    """

    def __init__(self, faults: list[tuple[int, str]], tree: object = None):
        super().__init__("; ".join(text for _, text in faults))
        self.faults, self.tree = faults, tree


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.doubles: list[tuple[int, str]] = []
        self.open: list[str | None] = []
        """The anchors of what is being composed."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Composes a node and refuses an alias inside of what it stands for."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.open:
            text = f"the anchor &{event.anchor} contains its own alias *{event.anchor}; write out what is meant"
            mark = event.start_mark
            raise YamlFault([(mark.line + 1 if mark else 0, text)])
        self.open.append(getattr(event, "anchor", None))
        node = super().compose_node(parent, index)
        self.open.pop()
        return node

    def compose_mapping_node(self, anchor: dict[object, yaml.Node]) -> MappingNode:
        """Composes a mapping and notes keys that stand twice.

        Later, when merged keys (``<<``) are among them, they could not be told apart.
        """
        node: MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                first = f"first in line {seen[key.value]}"
                self.doubles.append((line, f"the key {key.value!r} stands twice, {first}; merge the two or remove one"))
            seen.setdefault(key.value, line)
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str) -> object:
    """Returns the content of ``text``. Raises `YamlFault` with all keys that stand twice, or the first other fault."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node else None
    except YamlFault:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlFault([(mark.line + 1 if mark else 0, f"not valid YAML: {_problem(error)}")]) from None
    except yaml.YAMLError as error:
        raise YamlFault([(0, f"not valid YAML: {' '.join(str(error).split())}")]) from None
    except RecursionError:
        raise YamlFault([(0, "not valid YAML: nested too deep")]) from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        # A tag (!!int, !!timestamp) on a text that is none, or a number of thousands of digits.
        raise YamlFault([(0, f"not valid YAML: {' '.join(str(error).split())}")]) from None
    separate = _separate(tree)
    if loader.doubles:
        raise YamlFault(sorted(loader.doubles), separate)
    return separate


def write_yaml(tree: object) -> str:
    """Returns a text that `read_yaml` reads back to the same tree, in which no line is folded."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)


def _problem(error: yaml.MarkedYAMLError) -> str:
    return ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)


def _separate(tree: object) -> object:
    """Returns a copy in which every use of an anchor is an object of its own."""
    count = 0

    def copied(value: object) -> object:
        nonlocal count
        count += 1
        if count > _MOST_VALUES:
            raise YamlFault([(0, f"more than {_MOST_VALUES:,} values, with anchors counted where they are used")])
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        return [copied(item) for item in value] if isinstance(value, list) else value

    return copied(tree)
