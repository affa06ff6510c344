"""The commands of docs/end-to-end.md, as written, shortened and on a tiny model with the tokenizer of the page's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qlora_sft.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "end-to-end.md").read_text(encoding="utf-8")
SHORTER = {
    "train": "training.max_steps=2 evaluation.answers=1 evaluation.max_new_tokens=2 data.train.0.max_rows=20 "
    "data.train.1.max_rows=20",
    "evaluate": "--max-rows 5 --max-new-tokens 2",
}


def blocks(language: str) -> list[str]:
    """The blocks of the page in a language; what commands print has none."""
    return [text for named, text in re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.S) if named == language]


def test_the_commands_of_the_page(
    convertible_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))
    (recipe,) = blocks("yaml")
    # What the tiny model says is not graded, so its weights need not be quantised.
    named = re.sub(
        r"path: demo\b.*", f"path: {convertible_model}\n  load_in_4bit: false\n  backend: transformers", recipe, count=1
    )
    # The page is of a run with Unsloth, which computes shared prefixes anew for every row.
    Path("mixture.yaml").write_text(named.replace("data:\n", "data:\n  share_prefixes: 'off'\n", 1))
    commands = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == ["preview", "train", "evaluate", "report"]
    said = {}
    for command in commands:
        _, verb, *words = shlex.split(command)
        assert main([verb, *words, *SHORTER.get(verb, "").split()]) == 0, command
        said[verb] = capsys.readouterr().err
    # What preview judges does not depend on the weights: line by line it is what the page shows.
    shown = blocks("")[0].splitlines()
    assert any(line.startswith("warning: ") for line in shown)
    assert [line for line in shown if line not in said["preview"].splitlines()] == []
    assert "verdict: " in said["evaluate"]
    assert "verdict: " in PAGE
    assert Path("preview.html").is_file()
    assert Path("runs/mixture/report.html").is_file()
