"""Signatures say what passes through them: few are untyped, none is overlong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_sft

ROOT = Path(qlora_sft.__file__).parent.parent
FOLDERS = ("qlora_sft", "kernels/qlora_kernels")

MOST_ANY = 99
"""Functions whose signature may mention Any, in all; libraries without types need some."""
MOST_LINES = 80
MOST_PARAMETERS = 7
WIDE = {"document_attention"}
"""Functions that may take more: what transformers calls with arguments of its own."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(tree: ast.AST) -> Iterator[Function]:
    """Yields every function of a module, methods and nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def functions() -> Iterator[tuple[str, Function]]:
    """Yields every function of the packages with the place where it stands."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for function in functions_of(ast.parse(path.read_text(encoding="utf-8"))):
                yield f"{path.relative_to(ROOT)}:{function.lineno} {function.name}", function


def parameters(function: Function) -> list[ast.arg]:
    """Returns the parameters of a function without ``self`` and ``cls``."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [each for each in every if each is not None and each.arg not in ("self", "cls")]


def mentions_any(function: Function) -> bool:
    """Says whether an annotation of the signature mentions Any at any depth."""
    annotations = [each.annotation for each in parameters(function)] + [function.returns]
    names = (node for each in annotations if each is not None for node in ast.walk(each))
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in names)


def is_public_kernel(place: str, function: Function) -> bool:
    return place.startswith("kernels/") and not function.name.startswith("_")


def test_few_signatures_mention_any() -> None:
    found = [place for place, function in functions() if mentions_any(function)]
    assert len(found) <= MOST_ANY, f"{len(found)} signatures mention Any: give the newest ones a type\n" + "\n".join(
        found
    )


def test_no_function_is_overlong() -> None:
    lines = {place: (each.end_lineno or each.lineno) - each.lineno + 1 for place, each in functions()}
    assert {place: count for place, count in lines.items() if count > MOST_LINES} == {}


def test_no_function_takes_too_many_parameters() -> None:
    counts = {place: len(parameters(each)) for place, each in functions() if not is_public_kernel(place, each)}
    assert {
        place: count for place, count in counts.items() if count > MOST_PARAMETERS and place.split()[-1] not in WIDE
    } == {}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(a: int, *, b: dict[str, Any]) -> None: ...", True),
        ("def f(self) -> list[Any] | None: ...", True),
        ("async def f(*values: Any) -> None: ...", True),
        ("def f(a: object, b: 'str' = '') -> int:\n    c: Any = a\n    return c", False),
    ],
)
def test_any_is_seen_wherever_a_signature_has_it(code: str, expected: bool) -> None:
    (function,) = functions_of(ast.parse(code))
    assert mentions_any(function) is expected
