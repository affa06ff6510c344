"""One command, one report: whatever is wrong with keys, files, base, template and modules is said at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import conversation, write_rows
from tests_support import with_unsloth

from qlora_sft.cli import main

VERBS = ("train", "preview", "plan")


def report(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.split("error: ", 1)[1].strip().splitlines()


@pytest.mark.parametrize("verb", VERBS)
def test_keys_files_base_and_template_are_reported_together(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_rows(tmp_path / "good.jsonl", [conversation(1)]), tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [\n{"colour": "red"}\n')
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {path: ./none, chat_template: chatmel, backnd: auto}\n"
        f"data:\n  train: [{{path: {good}}}, {{path: {bad}}}, {{path: gone.jsonl, colums: {{}}}}, {{pth: x}}]\n"
        f"  held_out: [{{path: {tmp_path}/missing.jsonl, name: h}}]\n"
        "  decontaminate: [exam.csv]\n"
        "training: {learning_rate: .inf, epochs: 2, epochs: 0}\n"
        "lora: {r: 0512}\n"
        f"output: {tmp_path}/run\n"
    )
    assert main([verb, str(file)]) == 2
    found = report(capsys)
    for part in (
        f"{file}:6: the key 'epochs' stands twice",
        "unknown key 'model.backnd'",
        "unknown key 'data.train.2.colums'",
        "unknown key 'data.train.3.pth'",
        "missing key 'data.train.3.path'",
        "training.learning_rate must be a finite number, got inf",
        "training.epochs must be positive, got 0",
        "lora.r must be a whole number, got '0512'",
        f"{bad}:1: not valid JSON",
        "gone.jsonl: no such file",
        "missing.jsonl: no such file",
        "exam.csv: no such file",
        "model.chat_template: chatmel: neither a file nor a shipped template",
        "model.path: ./none: no such folder",
    ):
        assert sum(part in line for line in found) == 1, (part, found)


@pytest.mark.parametrize("verb", VERBS)
def test_modules_and_data_are_reported_together(
    verb: str, make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config()
    (tmp_path / "chat.jsonl").write_text("{\n")
    arguments = [str(tmp_path / "config.yaml"), "lora.target_modules=[qproj]", "model.chat_template=none.jinja"]
    assert main([verb, *arguments]) == 2
    found = report(capsys)
    assert len(found) == 3
    for part in ("chat.jsonl:1: not valid JSON", "none.jinja", "no linear layer is named ['qproj']"):
        assert part in "\n".join(found)


@pytest.mark.parametrize("lora", ["{target_modules: '[q'}", "{modules: [{match: '(v_proj', r: 4}]}"])
def test_a_faulty_regular_expression_is_one_fault_among_others(
    lora: str, make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is there, so its layers could be looked at: by a pattern that cannot be read."""
    make_config()
    recipe = tmp_path / "config.yaml"
    recipe.write_text(recipe.read_text() + f"lora: {lora}\ncolour: red\n")
    assert main(["train", str(recipe)]) == 2
    said = "\n".join(report(capsys))
    assert "is no regular expression" in said
    assert "unknown key 'colour'" in said


def test_an_output_that_is_taken_is_reported_with_the_rest(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config()
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert main(["train", str(tmp_path / "config.yaml"), "data.train.0.path=gone.jsonl"]) == 2
    first, second = report(capsys)
    assert "holds an earlier run" in first
    assert "gone.jsonl: no such file" in second


def test_a_single_fault_is_one_line(make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_config()
    for override in ("training.lr=1", "lora.alpha=0", "model.chat_template=none.jinja", "data.train.0.path=gone.jsonl"):
        assert main(["train", str(tmp_path / "config.yaml"), override]) == 2
        assert len(report(capsys)) == 1
    os.remove(tmp_path / "chat.jsonl")
    assert main(["train", str(tmp_path / "config.yaml"), "training.lr=1"]) == 2
    assert len(report(capsys)) == 2


@pytest.mark.parametrize("verb", VERBS)
def test_the_files_of_the_base_are_reported_with_the_data(
    verb: str, make_config: Any, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quantisation that cannot be trained, and a tokenizer that cannot be read."""
    make_config()
    (tmp_path / "chat.jsonl").write_text("{\n")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    (base / "tokenizer.json").write_text("{")
    assert main([verb, str(tmp_path / "config.yaml"), f"model.path={base}"]) == 2
    found = report(capsys)
    assert len(found) == 3
    for part in (
        "chat.jsonl:1: not valid JSON",
        "quantised with gptq",
        f"{base}: tokenizer.json is damaged",
    ):
        assert part in "\n".join(found)


NOTEBOOK = """
import sys
from qlora_sft import load_config, train
from qlora_sft.errors import QloraSftError
from qlora_sft.model.backend import choose_backend
try:
    train(load_config(sys.argv[1], ["model.backend=auto", "lora.target_modules=[qproj]"]))
except QloraSftError as error:
    print(error)
print(choose_backend("auto").name)
"""


@with_unsloth
def test_a_notebook_can_still_take_unsloth_after_a_report(make_config: Any, tmp_path: Path) -> None:
    """Which has to be imported before what it patches; this one says whether it was."""
    make_config()
    (tmp_path / "chat.jsonl").write_text("{\n")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "unsloth.py").write_text("import sys\nassert 'transformers' not in sys.modules, 'late'\n")
    path = os.pathsep.join([str(tmp_path / "packages"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(tmp_path / "config.yaml")],
        capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert "no linear layer is named ['qproj']" in done.stdout
    assert done.stdout.splitlines()[-1] == "unsloth"
