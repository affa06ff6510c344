"""What goes wrong while a run goes is said once, with its cure, and nothing is said of what is as it should be."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qlora_sft.data.documents import Sizes
from qlora_sft.training.alarms import Alarms
from qlora_sft.training.evaluations import AskedTasks, EvaluationRow, Evaluations
from qlora_sft.training.losses import StepLoss


def alarms_of(said: list[str], steps: int = 1000) -> Alarms:
    return Alarms(steps, lambda step: f"rows of step {step}", said.append)


def rows_of(tmp_path: Path, means: list[float]) -> list[EvaluationRow]:
    evaluations = Evaluations(tmp_path / "evaluations.jsonl")
    for number, mean in enumerate(means):
        evaluations.add(10 * number, {"a": mean}, 0.1)
    return evaluations.rows


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([3.0, 2.0, 2.1, 2.2, 2.3], "3 evaluations in a row, to 2.300 at step 40 from 2.000 at step 10"),
        ([3.0, 2.0, 2.1, 2.2, 2.1], None),
        ([3.0, 2.0, 2.001, 2.002, 2.003], None),  # less than anybody minds
        ([3.0, 2.9, 2.8, 2.7, 2.6], None),
        ([2.0, 2.1, 2.2], None),
        ([2.0, 2.1, 2.2, 2.3], "to 2.300 at step 30 from 2.000 at step 0"),  # worse than the base from the beginning on
        ([3.0, 2.0, 2.1, float("nan"), 2.2, 2.3], "to 2.300 at step 50"),
    ],
)
def test_a_held_out_loss_that_rises_is_said_once(tmp_path: Path, means: list[float], expected: str | None) -> None:
    rows, said = rows_of(tmp_path, means), list[str]()
    alarms = alarms_of(said)
    for number in range(len(rows)):
        alarms.evaluated(rows[: number + 1], keeps_best=True)
    alarms.evaluated(rows, keeps_best=True)
    assert len(said) == (expected is not None)
    if expected:
        assert expected in said[0]
        assert "by heart" in said[0]
        assert alarms.texts == [said[0].removeprefix("warning: ")]


def feed(alarms: Alarms, losses: list[float], quiet: bool = False, tokens: int = 100) -> None:
    for number, loss in enumerate(losses, start=1):
        alarms.step(number, StepLoss(loss, tokens), tokens, quiet)


def falling(seed: int, noise: float, steps: int = 300) -> list[float]:
    draw = random.Random(seed)
    return [(1 + 2 * 0.98**step) * draw.lognormvariate(0, noise) for step in range(steps)]


def test_a_spike_is_found_and_noise_is_none() -> None:
    for seed in range(50):
        said: list[str] = []
        losses = falling(seed, (0.02, 0.1, 0.3)[seed % 3])
        feed(alarms_of(said), losses)
        assert said == [], f"seed {seed}"
        losses[200] *= 5
        feed(alarms_of(said), losses)
        assert len(said) == 1, f"seed {seed}"
        assert said[0].startswith(f"warning: the loss of step 201 is {losses[200]:.3f}")
        assert "rows of step 200" in said[0]
        assert "training.max_grad_norm" in said[0]


def test_a_run_that_goes_on_remembers_its_alarms_and_does_not_repeat_them() -> None:
    losses = [*[2.0, 2.1] * 20, 30.0, *[2.0, 2.1] * 5, 40.0]
    first: list[str] = []
    whole = alarms_of(first)
    feed(whole, losses)
    again: list[str] = []
    resumed = alarms_of(again)
    feed(resumed, losses[:45], quiet=True)
    for number, loss in enumerate(losses[45:], start=46):
        resumed.step(number, StepLoss(loss, 100), 100)
    assert again == []
    assert resumed.texts == whole.texts != []
    assert resumed.found == whole.found


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([100, 900, 500, 60], None),  # the last step has what is left
        ([100, 1001, 500], "100 in step 1, 1,001 in step 2"),
        ([100, 900, 0, 500], "0 in step 3, 900 in step 2"),
        ([100, 900, 1000, 1000], None),
    ],
)
def test_steps_of_very_different_size(tokens: list[int], expected: str | None) -> None:
    said: list[str] = []
    alarms = alarms_of(said, steps=4)
    for number, count in enumerate(tokens, start=1):
        alarms.step(number, StepLoss(1.0, count) if count else None, count)
    assert len(said) == (expected is not None)
    assert not expected or (expected in said[0] and "training.gradient_accumulation" in said[0])


@pytest.mark.parametrize(
    ("tokens", "supervised", "expected"),
    [
        ([1000, 1000], [90, 95], "only 9.2% of the tokens are supervised"),
        ([1000, 1000], [300, 850], None),
        ([1000, 1000], [950, 960], "95.5% of the tokens of conversations are supervised"),
        ([1000, 1000], [999, 999], None),  # plain texts
        ([1000, 1000, 1000], [999, 999, 910], "91.0% of the tokens of conversations"),
        ([], [], None),
    ],
)
def test_the_share_of_supervised_tokens(tokens: list[int], supervised: list[int], expected: str | None) -> None:
    said: list[str] = []
    alarms_of(said).data(Sizes(["a"] * len(tokens), tokens, supervised, list(map(float, supervised))), False)
    assert len(said) == (expected is not None)
    assert not expected or expected in said[0]


@pytest.mark.parametrize(
    ("endless", "expected"),
    [
        ([0.5, 0.5], "50% of the answers to sums had not ended at their limit of tokens at step 20"),
        ([0.9, 0.3, 0.4], "40% of the answers to sums"),
        ([0.9, 0.8, 0.5], None),  # it learns to stop
        ([0.1, 0.2, 0.2], None),
        ([0.9], None),
        ([0.0, 0.0, 0.9], None),  # said when it stays so
    ],
)
def test_answers_that_never_stop(tmp_path: Path, endless: list[float], expected: str | None) -> None:
    evaluations, said = Evaluations(tmp_path / "evaluations.jsonl"), list[str]()
    alarms = alarms_of(said)
    for number, share in enumerate(endless, start=1):
        asked = AskedTasks({"sums": 0.5, "read loss": 1.0}, {"sums": share} if share else {})
        evaluations.add(10 * number, {}, 0.1, asked)
        alarms.evaluated(evaluations.rows, keeps_best=False)
    assert len(said) == (expected is not None)
    assert not expected or (expected in said[0] and "model.stop_tokens" in said[0])
    # A run that goes on finds it again, and says it no more.
    again = Evaluations(tmp_path / "evaluations.jsonl", begin=1000)
    resumed = alarms_of(repeated := list[str]())
    for number in range(len(again.rows)):
        resumed.evaluated(again.rows[: number + 1], keeps_best=False, quiet=True)
    assert (resumed.texts, repeated) == (alarms.texts, [])


@pytest.mark.parametrize(
    ("metric", "best", "since"),
    [
        ("held_out", [True, False, True, False], 1),
        ("held_out/b", [True, True, False, False], 2),
        ("tasks/sums", [True, False, False, True], 0),
        ("tasks/read", [True, False, True, False], 1),
    ],
)
def test_what_is_the_best_is_told_by_the_metric(tmp_path: Path, metric: str, best: list[bool], since: int) -> None:
    """More right answers are better, and less loss is."""
    file = tmp_path / "evaluations.jsonl"
    evaluations = Evaluations(file, 0, metric)
    losses = [(3.0, 2.0), (4.0, 1.5), (1.0, 2.0), (2.0, 2.0)]
    asked = [(0.5, 1.0), (0.5, 1.0), (0.4, 0.5), (0.6, 0.6)]
    for number, ((a, b), (right, loss)) in enumerate(zip(losses, asked, strict=True), start=1):
        evaluations.add(number, {"a": a, "b": b}, 0.0, AskedTasks({"sums": right, "read loss": loss}))
    assert [row.best for row in evaluations.rows] == best
    again = Evaluations(file, 4, metric)
    assert (again.best, again.since_best) == (evaluations.best, since)
