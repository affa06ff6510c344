"""How far something is, said where a line can redraw itself, and where it cannot."""

from __future__ import annotations

import sys

import pytest

from qlora_sft import say


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a bar of four units and returns what stands on stderr."""
    monkeypatch.setattr(say, "INTERVAL", 0.0)
    bar = say.progress(4, "answers", "token", delay=0)
    for _ in range(4):
        bar.update()
        bar.refresh()
    bar.close()
    return capsys.readouterr().err


def test_a_log_gets_lines_and_nothing_is_drawn_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(monkeypatch, capsys)
    assert "\r" not in text
    assert text.endswith("\n")
    assert "answers: 3 of 4 tokens, 00:00 gone, 00:00 left" in text.splitlines()


@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_a_terminal_and_a_notebook_get_one_line_that_goes_again(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: where == "terminal", raising=False)
    monkeypatch.setattr(say, "in_notebook", lambda: where == "notebook")
    text = shown(monkeypatch, capsys)
    assert "\n" not in text
    assert "75%" in text
    assert not text.rstrip("\r").rpartition("\r")[2].strip()
