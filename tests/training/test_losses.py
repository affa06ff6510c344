"""The first and the last loss of a run are means over enough tokens, and steps without labels have none."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.errors import DataError
from qlora_sft.train import train
from qlora_sft.training.losses import ENOUGH_TOKENS, StepLoss, summarize_losses
from qlora_sft.training.totals import StepTotals


def test_a_few_tokens_do_not_decide_the_first_and_the_last_loss() -> None:
    steps = [StepLoss(9.0, 1), *[StepLoss(2.0, 500)] * 8, *[StepLoss(1.0, 500)] * 8, StepLoss(7.0, 2)]
    summary = summarize_losses(steps)
    assert (summary.first_steps, summary.last_steps, summary.rose) == (3, 3, False)
    assert summary.first == pytest.approx((9 + 2 * 1000) / 1001)
    assert summary.last == pytest.approx((7 * 2 + 1000) / 1002)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_short_run_is_halved(count: int) -> None:
    steps = [StepLoss(float(number), 1) for number in range(1, count + 1)]
    summary = summarize_losses(steps)
    half = max(1, count // 2)
    assert (summary.first_steps, summary.last_steps) == (half, half)
    assert summary.first == pytest.approx((half + 1) / 2)
    assert summary.rose == (count > 1)


def test_one_step_with_enough_tokens_is_enough() -> None:
    steps = [
        StepLoss(3.0, ENOUGH_TOKENS),
        StepLoss(2.0, ENOUGH_TOKENS),
        StepLoss(2.0, 1),
        StepLoss(3.01, ENOUGH_TOKENS),
    ]
    summary = summarize_losses(steps)
    assert (summary.first, summary.last, summary.rose) == (3.0, 3.01, False)


def test_a_loss_that_jumps_up_at_once_has_risen_although_it_falls_from_there() -> None:
    spoilt = [StepLoss(loss, 12) for loss in (1.3, 30.0, 24.0, 19.0, 11.0, 9.5)]
    assert summarize_losses(spoilt).first > summarize_losses(spoilt).last
    assert summarize_losses(spoilt).rose
    assert summarize_losses(spoilt).base == 1.3
    healed = [*spoilt, StepLoss(1.2, 12), StepLoss(0.9, 12)]
    assert not summarize_losses(healed).rose


def noisy(seed: int, trend: float) -> list[StepLoss]:
    """The losses of a run that ends ``trend`` times as high as it began, with noise that falls with a step's tokens."""
    numbers = random.Random(seed)
    count = numbers.choice([6, 12, 30, 80])
    steps = []
    for number in range(count):
        tokens = numbers.randint(60, 600)
        level = 1.4 * trend ** (number / (count - 1))
        steps.append(StepLoss(level * math.exp(numbers.gauss(0, 1.5 / math.sqrt(tokens))), tokens))
    return steps


def test_noise_between_steps_is_no_rise_and_a_rise_beyond_it_is_one() -> None:
    """A step of 300 tokens is off by 9% here, so a mean over 1,000 tokens by 5%."""
    flagged = {
        trend: sum(summarize_losses(noisy(seed, trend)).rose for seed in range(300)) for trend in (0.5, 1.0, 2.0)
    }
    assert flagged[0.5] == 0
    assert flagged[1.0] <= 6  # 2%
    assert flagged[2.0] >= 270
    by_two_percent = sum(
        (summary := summarize_losses(noisy(seed, 1.0))).last > 1.02 * summary.first for seed in range(300)
    )
    assert by_two_percent > 60  # which is what a fixed factor would have said of them


def test_a_step_without_labels_has_no_loss() -> None:
    assert math.isnan(StepTotals().losses.loss)
    assert math.isnan(StepTotals().losses.accuracy)


def turn(answer: str, **marks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Capital?"}, {"role": "assistant", "content": answer, **marks}]}


WITHOUT_LABELS = [
    turn("Lyon", weight=0),
    turn("Lyon", weight=0.0),
    turn("Lyon", train=False),
    turn("Lyon", train=False, weight=1),
    {"messages": turn("Lyon")["messages"] + turn("Bonn", train=False)["messages"]},
]


def test_rows_without_labels_are_dropped_and_counted(make_config: Any, tmp_path: Path) -> None:
    """One step per row that has labels; ``supervise: last`` leaves the last of these rows without any."""
    rows = [*WITHOUT_LABELS, turn("Rome", weight=1)]
    config = make_config("data.packing=none", "training.max_steps=4", "data.train.0.supervise=last", rows=rows)
    said: list[str] = []
    report = train(config, say=said.append)
    file = tmp_path / "chat.jsonl"
    assert f"chat: 5 dropped (nothing supervised): {file}:1, {file}:2, {file}:3 ..." in "\n".join(said)
    assert report.steps == 1
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["supervised_tokens"] > 0 and row["loss"] > 0 for row in metrics)
    ledger = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]["chat"]
    assert (ledger["read"], ledger["kept"]) == (6, 1)
    assert ledger["dropped"]["nothing supervised"]["rows"] == 5


def test_the_shipped_case_has_one_step_with_a_loss(make_config: Any, tmp_path: Path) -> None:
    """Three of its four rows have nothing to learn; they were three steps, and the last loss was 0.000."""
    case = Path(__file__).parents[1] / "cases" / "rows_without_labels.jsonl"
    config = make_config(f"data.train.0.path={case}", "data.packing=none", "training.max_steps=4")
    said: list[str] = []
    report = train(config, say=said.append)
    assert f"rows_without_labels: 3 dropped (nothing supervised): {case}:1, {case}:2, {case}:3" in "\n".join(said)
    assert report.steps == 1
    assert report.train_loss.last == report.train_loss.first > 1
    assert "-> 0.000" not in said[-1]


def test_held_out_rows_without_labels_are_dropped_as_well(make_config: Any, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in (turn("Rome"), turn("Lyon", weight=0))))
    said: list[str] = []
    report = train(make_config("training.max_steps=1", f"data.held_out=[{{path: {held_out}}}]"), say=said.append)
    assert f"held_out: 1 dropped (nothing supervised): {held_out}:2" in "\n".join(said)
    assert report.loss["held_out"].before > 0


@pytest.mark.parametrize(
    ("rows", "overrides", "expected"),
    [
        (WITHOUT_LABELS[:4], [], "no token of 'chat' is supervised"),
        ([turn("Rome " * 40), WITHOUT_LABELS[0]], ["data.max_length=16"], "too long, except 1 in which nothing is"),
    ],
)
def test_a_source_without_a_usable_row_says_why(
    make_config: Any, rows: list[Any], overrides: list[str], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        train(make_config(*overrides, rows=rows), say=lambda _: None)
