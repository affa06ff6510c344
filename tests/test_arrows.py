"""The arrows between the packages point one way, lazy imports included."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qlora_sft

ROOT = Path(qlora_sft.__file__).parent
KERNELS = ROOT.parent / "kernels" / "qlora_kernels"

# From above to below; what stands in one line does not import each other.
ORDER = (
    "demo_run",
    "cli",
    "verbs",
    "train find_rate preview plan chat doctor",
    "install proofs",
    "export",
    "training",
    "evaluation",
    "page",
    "prepare",
    "run_data",
    "faults",
    "model",
    "run",
    "data",
    "markup",
    "demo",
    "reference recipe_list recipe_new",
    "convert",
    "config",
    "config_evaluation config_lora",
    "config_training",
    "config_data lora_from",
    "strict",
    "ranges yaml_text stopwatch download atomic gguf_file",
    "text cache say json_types units",
    "parallel",
    "errors",
    "qlora_kernels",
)


def imports_of(tree: ast.AST, module: str) -> Iterator[str]:
    """Every module, or name in a module, that the code imports when it runs, wherever the import stands.

    Not what only a type checker reads, nor what stands under ``if __name__ == "__main__"``, which runs in no import.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ("TYPE_CHECKING" in ast.dump(node.test) or "__main__" in ast.dump(node.test)):
            for other in node.orelse:
                yield from imports_of(other, module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports_of(node, module)


@functools.cache
def imports_in(source: str, module: str) -> tuple[str, ...]:
    """The same of a source, which is read once for all tests."""
    return tuple(imports_of(ast.parse(source), module))


def file_of(name: str, files: dict[str, str]) -> str | None:
    """The module that is imported by a dotted name, which may end with something in it."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def node_of(name: str) -> str | None:
    """The package, or the module beside the packages, that a dotted name is in; the kernels are one."""
    top, _, rest = name.partition(".")
    if top == "qlora_kernels":
        return top
    part = rest.split(".")[0]
    known = (ROOT / part).is_dir() or (ROOT / f"{part}.py").is_file()
    return part if top == "qlora_sft" and part and known else None


def graph_of(files: dict[str, str]) -> dict[str, set[str]]:
    """Package -> the packages that it imports. ``files``: dotted name -> source.

    Programs (``__main__``) stand above all and are imported by nobody.
    """
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        own = node_of(module)
        if own is None or module.endswith("__main__"):
            continue
        found = {node_of(name) for name in imports_in(source, module)}
        graph.setdefault(own, set()).update(name for name in found if name not in (None, own))
    return graph


def sources() -> dict[str, str]:
    files = {}
    for folder in (ROOT, KERNELS):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            files[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    return files


def back_arrows(graph: dict[str, set[str]]) -> list[str]:
    level = {name: number for number, line in enumerate(ORDER) for name in line.split()}
    return [f"{a} -> {b}" for a in sorted(graph) for b in sorted(graph[a]) if level[a] >= level[b]]


def test_no_package_imports_one_above_it() -> None:
    graph = graph_of(sources())
    assert graph.keys() <= set(" ".join(ORDER).split()), "a new package: say in ORDER where it stands"
    assert back_arrows(graph) == []


def test_no_module_is_in_a_circle() -> None:
    """Finer than packages: every file by itself."""
    files = sources()
    graph: dict[str, set[str | None]] = {}
    for module, source in files.items():
        graph[module] = {file_of(name, files) for name in imports_in(source, module)} - {None, module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "arrow",
    [
        "from qlora_sft.model.base import base_of",
        "def late() -> None:\n    from qlora_sft import model",
        "class A:\n    def f(self) -> None:\n        import qlora_sft.export.merge",
        "try:\n    import qlora_sft.train\nexcept ImportError:\n    pass",
    ],
)
def test_a_back_arrow_is_seen_wherever_it_stands(arrow: str) -> None:
    files = sources()
    files["qlora_sft.data.batch"] += f"\n{arrow}\n"
    (found,) = back_arrows(graph_of(files))
    assert found.startswith("data -> ")
    files["qlora_sft.data.batch"] = files["qlora_sft.data.batch"].replace(arrow, "")
    files["qlora_sft.data.batch"] += "if TYPE_CHECKING:\n    from qlora_sft.model import base\n"
    assert back_arrows(graph_of(files)) == []
