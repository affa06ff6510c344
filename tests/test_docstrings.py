"""A docstring says what its object does: it begins with a verb in the third person."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_signatures import FOLDERS, ROOT

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

NO_VERBS = {
    "as", "documents", "experts", "its", "paths", "positions", "questions", "rows", "this", "tokens", "values",
    "weights",
}  # fmt: skip
"""Words that end like a verb and are none here: what a docstring once began with in place of one, and its like."""


def documented(tree: ast.AST) -> Iterator[tuple[Documented, str]]:
    """Yields classes, functions and methods with their docstrings, but not what stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield node, text
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from documented(node)


def begins_with_a_verb(text: str) -> bool:
    """Says whether the first word can be a verb in the third person, which all end in s."""
    word = text.split()[0].rstrip(".,:;")
    return word.isalpha() and word.istitle() and word.endswith("s") and word.lower() not in NO_VERBS


def test_docstrings_begin_with_a_verb() -> None:
    faulty = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {text.splitlines()[0]}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node, text in documented(ast.parse(path.read_text(encoding="utf-8")))
        if not begins_with_a_verb(text)
    ]
    assert faulty == [], "begin with what it does ('Returns the ...', 'Says whether ...'):\n" + "\n".join(faulty)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Returns the decoder's blocks.", True),
        ("Computes H = act(G) U.", True),
        ("Yields.", True),
        ("Whether a stack is quantised.", False),
        ("Of the decoder layers of a model.", False),
        ("Values between -1 and 1.", False),
        ("Return the decoder's blocks.", False),
        ("x [T, D] -> [T, D]", False),
        ("[n, 1]: ``dy`` times ``h``.", False),
        ("``base`` with a saved adapter.", False),
    ],
)
def test_what_is_no_verb_is_seen(text: str, expected: bool) -> None:
    assert begins_with_a_verb(text) is expected


def test_methods_are_seen_and_nested_functions_are_not() -> None:
    code = 'class A:\n "Holds."\n def f(self):\n  "Says."\n  def g():\n   "Inner."\nasync def h():\n "Runs."'
    assert [node.name for node, _ in documented(ast.parse(code))] == ["A", "f", "h"]
