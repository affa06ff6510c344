"""What README, docs and the headers of recipes say exists: commands, settings, pieces of recipes, error messages."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from test_reference import all_keys

from qlora_sft import cli
from qlora_sft.config import RECIPES, load_config
from qlora_sft.yaml_text import read_yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
HEADERS = {file.name: "".join(re.findall(r"^#.*\n", file.read_text(), flags=re.M)) for file in RECIPES.glob("*.yaml")}
KEYS = {path for path, _ in all_keys()}
SECTIONS = "model|data|lora|training|evaluation|memory"


def commands(text: str) -> list[str]:
    """Lines of shell blocks and of recipe headers, and code within sentences."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    lines += re.findall(r"^#   (qlora-sft .*)$", text, flags=re.M)
    lines += re.findall(r"`(qlora-sft [^`]*)`", text)
    found = [line.removeprefix(".venv/bin/").split("  #")[0].split(" #")[0].strip() for line in lines]
    return [command for command in found if command.startswith("qlora-sft ")]


ALL = [(name, command) for name, text in {**TEXTS, **HEADERS}.items() for command in commands(text)]


@pytest.mark.parametrize(("page", "command"), ALL)
def test_every_command_is_one(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    if len(words) == 1 and words[0].isupper():  # `qlora-sft VERB`
        return
    if len(words) == 1:  # a verb that the sentence speaks of
        with pytest.raises(SystemExit, match="0"):
            cli.main([*words, "--help"])
        return
    arguments = cli._arguments(words)
    if "overrides" in arguments and (RECIPES / f"{arguments.config}.yaml").is_file():
        load_config(arguments.config, arguments.overrides)


def test_there_are_commands() -> None:
    assert {command.split()[1] for _, command in ALL} >= {"new", "recipes", "preview", "plan", "train", "evaluate"}


@pytest.mark.parametrize("page", TEXTS)
def test_every_setting_that_is_named_exists(page: str) -> None:
    named = re.findall(rf"`((?:{SECTIONS})\.[a-z_.0-9]+)", TEXTS[page])
    keys = {re.sub(r"\.\d+", "", name).rstrip(".") for name in named}
    assert sorted(keys - KEYS) == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_piece_of_a_recipe_loads(page: str, tmp_path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", TEXTS[page], flags=re.S):
        tree = read_yaml(block)
        assert isinstance(tree, dict)
        rest = {"model": "model: {path: demo}", "data": "data: {train: [{path: a.jsonl}]}", "output": "output: out"}
        if "train" not in (tree.get("data") or {"train": []}):
            block = block.replace("data:\n", "data:\n  train: [{path: a.jsonl}]\n")
        lines = [line for name, line in rest.items() if name not in tree]
        file = tmp_path / "piece.yaml"
        file.write_text("\n".join([block, *lines]))
        load_config(file)


def messages() -> str:
    """All texts in the code, one a line, with … for what is filled in."""
    found = []
    for file in (ROOT / "qlora_sft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    code = messages()
    quoted = re.findall(r"^- `([^`]*)`", TEXTS["docs/troubleshooting.md"], flags=re.M)
    assert len(quoted) > 30
    for message in quoted:
        for piece in message.split("…"):
            assert piece.strip() in code, f"{message}: no error says {piece!r}"
