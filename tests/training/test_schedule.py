"""The learning rate of every step: its values at the ends of each part, and no step at a rate of zero."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_sft.config import TrainingConfig
from qlora_sft.errors import ConfigError
from qlora_sft.training.schedule import Schedule, describe_schedule, rate_factor, schedule_of
from qlora_sft.training.steps import count_steps, settle_accumulation


def factors(steps: int, **training: Any) -> list[float]:
    schedule = schedule_of(TrainingConfig(**training), steps)
    return [rate_factor(schedule, step) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("steps", "training", "wanted"),
    [
        (6, {"warmup_steps": 2}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0]),
        (6, {"warmup_ratio": 0.34}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0]),
        (3, {"warmup_ratio": 0.0}, [1, 2 / 3, 1 / 3, 0]),
        (4, {"warmup_steps": 2, "initial_rate_fraction": 0.5}, [0.5, 0.75, 1, 0.5, 0]),
        (5, {"warmup_steps": 1, "schedule": "cosine"}, [0.5, 1, 0.8535534, 0.5, 0.1464466, 0]),
        (4, {"warmup_steps": 1, "schedule": "constant"}, [0.5, 1, 1, 1, 0]),
        (10, {"warmup_steps": 1, "schedule": "wsd"}, [0.5, *[1] * 7, 2 / 3, 1 / 3, 0]),
        (4, {"warmup_ratio": 0.0, "schedule": "wsd", "decay_ratio": 1.0}, [0.8, 0.6, 0.4, 0.2, 0]),
        (1, {"schedule": "wsd"}, [0.5, 0]),
        (1, {"schedule": "cosine"}, [1, 0]),
    ],
)
def test_the_rate_of_every_step(steps: int, training: dict[str, Any], wanted: list[float]) -> None:
    assert factors(steps, **training) == pytest.approx(wanted)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "constant", "wsd"]), st.integers(1, 200), st.floats(0, 0.99),
    st.floats(0.001, 1.0), st.one_of(st.none(), st.floats(0.001, 1.0)),
)  # fmt: skip
def test_no_step_is_wasted_and_the_rate_rises_once_and_falls_once(
    kind: Any, steps: int, warmup: float, decay: float, initial: float | None
) -> None:
    found = factors(steps, schedule=kind, warmup_ratio=warmup, decay_ratio=decay, initial_rate_fraction=initial)
    assert found.pop() == 0.0
    assert all(0 < factor <= 1 for factor in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_a_warm_up_that_never_ends_is_refused_and_the_course_is_said() -> None:
    with pytest.raises(ConfigError, match=r"a warm-up of 100 steps would never reach the learning rate in a run of 40"):
        schedule_of(TrainingConfig(warmup_steps=100), 40)
    assert describe_schedule(Schedule("wsd", 10, 2, 0.5, 3)) == (
        "rises over 2 steps from 50%, then stays, and falls linearly to zero over the last 3 steps"
    )


def test_tokens_per_step_decide_the_accumulation(make_config: Any) -> None:
    config = make_config("training.tokens_per_step=1000", "training.batch_size=2")
    settled, told = settle_accumulation(config, [90, 110, 100, 100, 100])  # three micro-batches
    assert settled.training.gradient_accumulation == 6
    assert "6 micro-batches of 167 tokens on average" in told
    assert count_steps(24, settled) == 2
    assert settle_accumulation(make_config("training.tokens_per_step=1"), [5000])[0].training.gradient_accumulation == 1
    config = make_config("training.gradient_accumulation=3")
    assert settle_accumulation(config, [90]) == (config, "")


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["training.tokens_per_step=9", "training.gradient_accumulation=2"],
            "tokens_per_step decides the accumulation",
        ),
        (["training.warmup_steps=9", "training.warmup_ratio=0.2"], "warmup_steps replaces training.warmup_ratio"),
        (["training.decay_ratio=0.5"], "decay_ratio has an effect with training.schedule=wsd only"),
        (["training.initial_rate_fraction=0.5", "training.warmup_ratio=0"], "has no effect without a warm-up"),
        (["training.schedule=wsd", "training.decay_ratio=0.5", "training.warmup_ratio=0.6"], "more than the whole run"),
        (["training.neftune_alpha=5", "data.share_prefixes=on"], "on cannot be combined with noise"),
    ],
)
def test_what_makes_no_sense_together_is_refused(make_config: Any, overrides: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make_config(*overrides)
