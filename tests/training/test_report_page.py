"""Training keeps what its report needs, writes the report at its end, and does not fail where that fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, conversation, write_rows
from page_check import checked
from test_resume import Crash, at_step, crash
from tests_support import SHORT, documents_of

from qlora_sft.cli import main
from qlora_sft.page.facts import read_run
from qlora_sft.page.write import draw_report
from qlora_sft.train import train
from qlora_sft.training.said import Said


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_writes_its_report_and_what_the_report_is_made_of(
    make_config: MakeConfig, tmp_path: Path, tokenizer: Any
) -> None:
    more = write_rows(tmp_path / "more.jsonl", [conversation(i, 2) for i in range(5)])
    held_out = write_rows(tmp_path / "held_out.jsonl", [conversation(i) for i in range(50, 53)])
    config = make_config(
        f"data.train=[{{path: {tmp_path / 'chat.jsonl'}}}, {{path: {more}, loss_weight: 0.5}}]",
        f"data.held_out=[{{path: {held_out}}}]", "training.max_steps=3", "evaluation.answers=2",
        "evaluation.max_new_tokens=4", "evaluation.every_steps=1", "data.packing=none",
        # Of some rows, so that a step is not what its configuration alone says.
        "training.tokens_per_step=200",
    )  # fmt: skip
    said: list[str] = []
    train(config, say=said.append)
    run = Path(config.output)
    assert f"report: {run / 'report.html'}" in said
    page = (run / "report.html").read_text()
    checked(page)
    for part in ("curves", "held-out", "answers", "data", "mask", "machine", "choices", "settings", "manifest"):
        assert f'<section id="{part}">' in page
    assert 'id="lacks"' not in page
    measured = [row["held_out"]["held_out"] for row in lines(run / "evaluations.jsonl")]
    assert len(measured) == 4
    figure = page.split("<b>Held-out loss</b>")[1].split("</figure>")[0]
    for number, loss in enumerate(measured):
        assert f'<td>{number}</td><td class="n">{loss:.3f}</td>' in figure
    assert "Training loss by source</b>" in page
    assert read_run(run).lacks == []

    # The answers that it says stand below what was asked.
    sample = lines(run / "samples.jsonl")[0]
    asked = next(text for text in said if "asked: " in text)
    end = repr(sample["prompt"][-60:])[1:-1]
    assert re.search(rf"asked: '.*{re.escape(end)}'\n  wanted: {re.escape(repr(sample['reference']))}\n", asked)

    # What it says that it was trained on is what the steps were made of, counted anew.
    kept = json.loads((run / "trained_on.json").read_text())
    documents = documents_of(config)
    of_step = int(next(text for text in said if text.startswith("accumulation: ")).split()[1])
    assert of_step > 1
    order = json.loads((run / "order.json").read_text())["bins"][: kept["steps"] * of_step]
    assert kept["steps"] == 3
    trained = [documents[index] for sequence in order for index in sequence]
    assert kept["mixture"] == {
        name: {
            "documents": sum(each.source == name for each in trained),
            "tokens": sum(len(each.input_ids) for each in trained if each.source == name),
            "supervised": sum(each.n_supervised for each in trained if each.source == name),
        }
        for name in ("chat", "more")
    }
    assert sum(row["supervised_tokens"] for row in lines(run / "metrics.jsonl")) == sum(
        each["supervised"] for each in kept["mixture"].values()
    )
    # The mask that it shows is that of the first document of each source.
    for shown in kept["documents"]:
        document = next(each for each in trained if each.source == shown["source"])
        assert "".join(piece["text"] for piece in shown["pieces"]) == tokenizer.decode(document.input_ids)
        weighted = [i for i, weight in zip(document.input_ids, document.weights, strict=True) if weight > 0]
        assert "".join(piece["text"] for piece in shown["pieces"] if piece["weight"]) == tokenizer.decode(weighted)
    # All that it said before its last word is kept.
    assert [row["text"] for row in lines(run / "said.jsonl")] == said


def test_a_run_that_goes_on_keeps_what_was_said_before(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(*SHORT)
    run = Path(config.output)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            train(config, say=lambda _: None)
    before = lines(run / "said.jsonl")
    assert main(["report", str(run)]) == 0
    assert "not finished: 3 of 6 steps" in (run / "report.html").read_text()
    said: list[str] = []
    train(config, resume=True, say=said.append)
    assert lines(run / "said.jsonl") == [*before, *({"text": text} for text in said)]
    page = (run / "report.html").read_text()
    assert ">finished<" in page
    assert "went on here" in page


def test_a_report_that_cannot_be_drawn_fails_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    draw_report(tmp_path, said.append)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (tmp_path / "report.html").mkdir()
    draw_report(tmp_path, said.append)
    assert len(said) == 2
    assert "report: not drawn (ConfigError: " in said[0]
    assert f"the run is complete without it. `qlora-sft report {tmp_path}` tries again" in said[1]


def test_what_cannot_be_written_is_still_said(tmp_path: Path) -> None:
    heard: list[str] = []
    say = Said(heard.append)
    say("one")
    say.keep_in(tmp_path / "gone")
    say("two")
    assert heard == ["one", "two"]
    say.keep_in(tmp_path)
    say("three \ud800 ü")
    assert [row["text"] for row in lines(tmp_path / "said.jsonl")] == ["three \ud800 ü"]
