"""The README's commands, as written, shortened by an override: they must not rot."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import support_matrix
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora_sft.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Whose commands are run, one after the other.
PAGES = "".join([README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ("evaluation", "export"))])


WITHOUT_MAKE = ("python3 -m venv .venv", ".venv/bin/python -m qlora_sft.install")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands() -> list[str]:
    return [line.split("#")[0].strip() for block in blocks("sh", PAGES) for line in block.splitlines() if line.strip()]


def test_the_support_matrix_is_that_of_what_was_tried() -> None:
    tried = support_matrix.families()
    lines = (ROOT / "docs" / "families.jsonl").read_text().splitlines()
    rows = {row["kind"]: row for row in map(json.loads, lines)}
    for family, template in support_matrix.NAMES.values():
        assert rows[family]["how"] in ("packed", "alone")
        assert (tried[family][0] == "packed") == (rows[family]["how"] == "packed")
        assert bool(tried[family][3]) == rows[family]["tiled"]
        if template:
            assert (ROOT / "qlora_sft" / "data" / "templates" / f"{template}.jinja").is_file()
    assert support_matrix.written(README) == README, "run python benchmarks/support_matrix.py"


def run(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command, shell=True, cwd=cwd, capture_output=True, text=True, input="Hi\n", env={**os.environ, **environment}
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def test_every_command_is_covered_below() -> None:
    known = (
        "git clone https://",
        "cd ",
        "make demo",
        "make test",
        "make install",
        ".venv/bin/qlora-sft ",
        *WITHOUT_MAKE,
    )
    assert [command for command in commands() if not command.startswith(known)] == []


def test_what_is_cloned_is_what_the_notebooks_fetch() -> None:
    (cloned,) = re.findall(r"^git clone (\S+)$", README, flags=re.M)
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert f'"{cloned}", home' in "".join(cells[2]["source"])
    assert f"cd {cloned.rpartition('/')[2]}" in commands()


@pytest.mark.parametrize("picture", re.findall(r"!\[.+?\]\((docs/images/\S+\.png)\)", README))
def test_pictures_fit_a_readme(picture: str) -> None:
    content = (ROOT / picture).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(content[16:20]), int.from_bytes(content[20:24])) == (1000, 700)
    assert len(content) < 100_000


def test_the_installation_is_what_make_does() -> None:
    # Within `make test` this make is a make's child, which would name the folder that it enters.
    done = run("make --no-print-directory --dry-run --always-make install", ROOT).stdout.splitlines()
    assert tuple(done[:2]) == WITHOUT_MAKE
    assert set(WITHOUT_MAKE) < set(commands())


def test_the_tests_are_what_make_runs() -> None:
    assert {"make demo", "make test"} <= set(commands())
    assert "pytest" in run("make --dry-run test", ROOT).stdout


def run_here(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command in this process, where all is imported, with a line of input; returns what it printed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    code, printed = main(shlex.split(command)[1:]), capsys.readouterr()
    assert code == 0, f"{command}\n{printed.out}\n{printed.err}"
    return printed.out


def base_for_readme(folder: Path, model: Path) -> None:
    """A copy of ``model`` with more positions, which does not only say the line break again that a prompt ends in."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(model).encode("\n")] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_the_commands_for_ones_own_data(
    tmp_path: Path, convertible_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(sys.prefix) / "bin" / "qlora-sft"
    if not script.exists():
        pytest.skip("needs the installed console script")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    base_for_readme(tmp_path / "my-base-model", convertible_model)
    (row,) = blocks("json")
    for name in re.findall(r"(\w+\.jsonl)", " ".join(commands())):
        (tmp_path / name).write_text(row * 2)
    (tmp_path / "mmlu.jsonl").write_text('{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}\n')
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4"}\n')
    # A server does not end by itself; tests/test_chat.py has one.
    left_out = (
        "--serve",
        "doctor",
        "--find-rate",
    )  # they are in tests of their own
    ours = [command for command in commands() if command.startswith(".venv/bin/qlora-sft")]
    ours = [command for command in ours if not any(word in command for word in left_out)]
    verbs = "new preview plan train chat evaluate report merge export chat".split()
    verbs += "evaluate evaluate evaluate compare export export push".split()
    assert [command.split()[1] for command in ours] == verbs
    # The demo, whose recipe has tasks, was not trained here.
    ours = [command.replace("runs/demo", "runs/support --task questions.jsonl") for command in ours]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ollama").write_text("#!/bin/sh\necho $* > ../../../ollama.said\n")
    (tmp_path / "bin" / "ollama").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    # As it is written, by the script; the others would import everything anew.
    run(ours[0], tmp_path)
    for number, command in enumerate(ours[1:], 1):
        extra = {
            "preview": " --count 1",
            "plan": " --no-time",
            "train": " training.max_steps=1 evaluation.answers=1 evaluation.max_new_tokens=4",
        }
        extra["chat"] = " --max-new-tokens 8"
        extra["evaluate"] = " --max-new-tokens 4 --samples 2 --max-rows 2"
        # The first export is compared, which is enough.
        extra["export"] = " --no-parity" if number > verbs.index("export") else ""
        printed = run_here(command + extra.get(verbs[number], ""), monkeypatch, capsys)
        if verbs[number] == "chat":
            assert printed.strip().removeprefix(">").strip()
    assert (tmp_path / "runs/support/gguf/support-q8_0.gguf").is_file()
    assert (tmp_path / "ollama.said").read_text() == "create support -f support-q8_0.Modelfile\n"
    assert "supervised" in (tmp_path / "preview.html").read_text()
    known = {".venv", "my-base-model", "support.yaml", "runs", "preview.html", "bin", "ollama.said"}
    unexpected = {path.name for path in tmp_path.iterdir()} - known
    assert all(name.endswith(".jsonl") for name in unexpected)
