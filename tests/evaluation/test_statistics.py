from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.evaluation.statistics import paired_change, pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_answer(case: tuple[int, int, int]) -> None:
    samples, right, k = case
    outcomes = [True] * right + [False] * (samples - right)
    choices = [any(chosen) for chosen in combinations(outcomes, k)]
    assert pass_at_k(samples, right, k) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert 0 < pass_at_k(10_000, 3, 100) < 0.04


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_refuses_counts_that_cannot_be(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass_at_k wants"):
        pass_at_k(*arguments)


def test_the_interval_holds_the_true_change_about_95_times_in_100() -> None:
    """Questions of very different difficulty, on which the second model is right 5 points more often."""
    drawn = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        easy = drawn.uniform(0.05, 0.9, size=150)
        base = (drawn.uniform(size=150) < easy).astype(float)
        after = (drawn.uniform(size=150) < easy + 0.05).astype(float)
        c = paired_change(base, after, np.ones(150), seed=trial)
        held += c.low <= 0.05 <= c.high
    assert 0.9 <= held / 200 <= 0.99


def test_pairing_makes_the_interval_that_of_the_change() -> None:
    """Losses between 1 and 9 that all fall by the same 0.1: there is nothing uncertain about the change."""
    base = np.linspace(1, 9, 50)
    c = paired_change(base, base - 0.1, np.linspace(1, 5, 50))
    assert c.difference == pytest.approx(-0.1)
    assert c.low == pytest.approx(-0.1)
    assert c.high == pytest.approx(-0.1)


def test_a_few_changed_items_are_no_proof() -> None:
    base = [1.0] * 200
    assert not paired_change(base, [0.0] * 5 + [1.0] * 195, base).fallen
    assert paired_change(base, [0.0] * 6 + [1.0] * 194, base).fallen
    assert not paired_change([1.0], [0.0], [1.0]).fallen


def test_long_texts_weigh_by_their_tokens() -> None:
    c = paired_change([1.0, 2.0], [1.0, 3.0], [30.0, 10.0])
    assert (c.base, c.tuned) == (1.25, 1.5)
