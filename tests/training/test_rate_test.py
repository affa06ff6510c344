"""A range test suggests a rate that trains, draws what it saw, and touches nothing of a run."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import MakeConfig, conversation

from qlora_sft.cli import main
from qlora_sft.training import rate_test
from qlora_sft.training.rate_curve import Tried, smoothed, suggest, text_curve
from qlora_sft.training.rate_test import HIGHEST, LOWEST, STEPS, rate_of


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
        assert f"{rate:.0e}" == f"{float(f'{rate:.0e}'):.0e}"
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
