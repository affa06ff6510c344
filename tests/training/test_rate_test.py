"""A range test suggests a rate that trains, draws what it saw, and touches nothing of a run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, conversation

from qlora_sft.cli import main
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.find_rate import find_rate, page_beside
from qlora_sft.training import rate_test
from qlora_sft.training.rate_curve import Tried, rate_page, smoothed, suggest, text_curve
from qlora_sft.training.rate_test import HIGHEST, LOWEST, STEPS, rate_of
from qlora_sft.training.trainer import PackedSFTTrainer


def planted(best: float, fall: float, seed: int) -> list[Tried]:
    """A loss that falls towards the rate ``best`` and is spoiled beyond it, on rows of very different difficulty."""
    draw = random.Random(seed)
    tried = []
    for step in range(STEPS):
        rate, before = rate_of(step), 2.0 * draw.uniform(0.5, 1.5)
        x = math.log10(rate / best)
        change = -fall * math.exp(-(x**2)) if x < 0 else -fall + 3 * x**2
        tried.append(Tried(rate, before, before + change + draw.gauss(0, 0.02)))
    return tried


@pytest.mark.parametrize("best", [1e-4, 2e-3, 5e-2])
def test_it_is_a_tenth_of_where_the_loss_is_lowest(best: float) -> None:
    for seed in range(20):
        rate, reason = suggest(planted(best, 0.8, seed))
        assert rate is not None
        assert best / 10 / 2 <= rate <= best / 10 * 3, seed
        assert rate == float(f"{rate:.0e}")
        assert f"{rate:.0e}"[0] in "1235"
        assert "a tenth of" in reason


def test_a_loss_that_falls_nowhere_suggests_nothing() -> None:
    rate, reason = suggest(planted(1e-3, 0.0, 1))
    assert rate is None
    assert "fell at no rate" in reason
    assert suggest([]) == (None, reason)


def test_the_rates_go_up_evenly() -> None:
    rates = [rate_of(step) for step in range(STEPS)]
    assert (rates[0], rates[-1]) == (LOWEST, pytest.approx(HIGHEST))
    assert all(b / a == pytest.approx(rates[1] / rates[0]) for a, b in pairwise(rates))


def test_the_mean_of_equal_values_is_their_value() -> None:
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)


def test_the_curve_is_drawn_as_text() -> None:
    drawn = text_curve(planted(1e-3, 0.8, 0)).splitlines()
    assert max(map(len, drawn)) <= 80
    rows = [line.split("|")[1] for line in drawn if "|" in line]
    lowest = max(number for number, row in enumerate(rows) if "*" in row)
    assert rows[lowest].index("*") < 0.65 * len(rows[lowest]) < len(rows[0].rstrip())
    assert "1e-6" in drawn[-1]
    assert "1e0" in drawn[-1]


def test_the_page_has_the_name_of_the_folder_as_text() -> None:
    drawn = rate_page(planted(1e-3, 0.8, 0), None, "why", "Learning rates for runs/<b>&")
    assert "<h1>Learning rates for runs/&lt;b&gt;&amp;</h1>" in drawn
    assert "<b>&" not in drawn


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("before", ("where the loss before training is measured (CUDA out of memory)", "model.head_in_4bit")),
        ("step", ("with as little kept as possible (CUDA out of memory)", "a smaller training.batch_size")),
        ("update", ("updates the weights (CUDA out of memory)", "paged_adamw_8bit")),
    ],
)
def test_a_full_gpu_ends_it_with_the_cure_and_speaks_of_no_checkpoint(
    where: str, expected: tuple[str, str], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second step, so that a step is done that a run would save."""
    calls: list[int] = []

    def full_at(number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) >= number:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return own(*arguments, **options)

        return counted

    if where == "before":
        monkeypatch.setattr(rate_test, "batch_loss", full_at(1, rate_test.batch_loss))
    elif where == "step":
        monkeypatch.setattr(PackedSFTTrainer, "compute_loss", full_at(2, PackedSFTTrainer.compute_loss))
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", full_at(2, torch.optim.AdamW.step))
    monkeypatch.setattr(rate_test, "STEPS", 4)
    said: list[str] = []
    config = make_config("data.packing=none", "training.gradient_accumulation=1", "training.batch_size=1")
    saved: list[object] = []
    monkeypatch.setattr(PackedSFTTrainer, "_save_checkpoint", lambda *arguments: saved.append(arguments))
    with pytest.raises(RunError) as caught:
        find_rate(config, say=said.append)
    assert all(part in str(caught.value) for part in expected)
    assert str(caught.value).endswith("; nothing of the test is kept")
    assert saved == []
    assert not any("checkpoint not" in text or "--resume" in text for text in said)


def test_where_the_page_cannot_be_written_nothing_is_trained(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run-rates.html").mkdir()
    for output, why in (("file/run", "file is a file; name a folder"), ("run", "run-rates.html is a folder")):
        with pytest.raises(ConfigError, match=why):
            find_rate(make_config(f"output={tmp_path / output}", "data.train.0.path=gone.jsonl"))
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for output, page in ((".", "here-rates.html"), ("inner/..", "here-rates.html"), ("inner", "here/inner-rates.html")):
        assert page_beside(make_config(f"output={output}")) == tmp_path / page


def test_it_suggests_a_rate_and_leaves_the_run_alone(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier run is in the folder, and every row comes often: there are few."""
    monkeypatch.setattr(rate_test, "STEPS", 40)
    make_config(rows=[conversation(i % 3) for i in range(12)])
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text("{}")
    command = ["train", str(tmp_path / "config.yaml"), "--find-rate", "data.max_length=160", "training.batch_size=2"]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert 1e-6 < report["suggested"] <= 0.1
    assert report["rates"][0] == LOWEST
    # The first steps change nothing that could be told from rounding, whatever their rows are.
    assert max(map(abs, report["changes"][:5])) < 1e-2
    assert min(report["changes"]) < -0.1
    assert "all rows come" in err
    page = Path(report["page"])
    assert page == tmp_path / "run-rates.html"
    assert f"suggested: {report['suggested']:g}" in page.read_text()
    assert [path.name for path in run.iterdir()] == ["manifest.json"]
    assert main([*command, "--resume"]) == 2
    assert "--find-rate keeps nothing" in capsys.readouterr().err
    assert main([*command, "data.train.0.path=gone.jsonl"]) == 2
    assert "gone.jsonl: no such file" in capsys.readouterr().err


def test_a_rate_too_small_to_matter_changes_no_loss_although_the_run_has_noise(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss before the test is measured without noise, so noise would stand in the curve as what a rate has done."""
    monkeypatch.setattr(rate_test, "STEPS", 3)
    monkeypatch.setattr(rate_test, "HIGHEST", 1e-6)
    report = find_rate(make_config("training.neftune_alpha=300"), say=lambda _: None)
    assert report.changes == pytest.approx([0.0] * 3, abs=1e-3)
