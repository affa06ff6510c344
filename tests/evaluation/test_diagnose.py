"""What all tasks together say of a model, and what reinforcement learning can expect of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.evaluation.ask import repetition
from qlora_sft.evaluation.compare import MetricChange, TaskReport
from qlora_sft.evaluation.diagnose import diagnosed
from qlora_sft.evaluation.outlook import questions_needed, rl_outlook, wilson


def report(
    name: str, form: Any, base: float, tuned: float, verdict: str, again: str | None = None, shots: int | None = None
) -> TaskReport:
    metric = {"loss": "loss", "refusal": "refused", "choices": "accuracy"}.get(form, "pass@1")
    moved = tuned - base
    return TaskReport(
        name=name, form=form, path=f"{name}.jsonl", questions="x", items=40, seed=0, base={metric: base},
        tuned={metric: tuned}, change={metric: MetricChange(difference=moved, interval=[moved - 0.01, moved + 0.01])},
        verdict=verdict, reason="", asks_again=again, shots=shots, phrasing=None if shots or not again else "polite",
        differing=9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reports", "verdict", "sign"),
    [
        (  # examples bring it back
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.6, 0.59, "no difference shown", "sums", 4),
             report("sums-polite", "number", 0.6, 0.2, "worse", "sums")],
            "alignment tax", "the answers are back with 4 examples (pass@1 60.0% to 59.0%)",
        ),
        (  # nothing does
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.6, 0.1, "worse", "sums", 4)],
            "forgetting", "pass@1 60.0% to 20.0%, and with 4 examples (pass@1 60.0% to 10.0%) as well",
        ),
        (  # nor that in other words the base has nothing to lose
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.6, 0.1, "worse", "sums", 4),
             report("sums-polite", "number", 0.0, 0.0, "no difference shown", "sums")],
            "forgetting", "and with 4 examples (pass@1 60.0% to 10.0%) as well",
        ),
        (  # nor that the base cannot follow examples
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.0, 0.0, "no difference shown", "sums", 4),
             report("sums-polite", "number", 0.5, 0.1, "worse", "sums")],
            "forgetting", "and in other words (polite) (pass@1 50.0% to 10.0%) as well",
        ),
        ([report("sums", "number", 0.6, 0.2, "forgetting")], "forgetting", "pass@1 60.0% to 20.0%"),
        ([report("sums", "number", 0.6, 0.2, "worse")], "worse", "sums: worse"),
        ([report("benign", "refusal", 0.02, 0.6, "worse")], "refusals", "refused 2.0% to 60.0%"),
        ([report("wiki", "loss", 3.0, 3.4, "worse")], "forgetting", "loss 3.000 to 3.400"),
        ([report("sums", "number", 0.2, 0.6, "better"), report("wiki", "loss", 3.0, 3.01, "no difference shown")],
         "better", "sums: better"),
        ([report("wiki", "loss", 3.0, 3.01, "no difference shown")], "no difference shown", None),
        # Surely higher, and by less than any training brings about.
        ([report("wiki", "loss", 3.0, 3.02, "worse")], "no difference shown", None),
        (  # behind examples both fail, which brings nothing back
            [report("sums", "number", 0.6, 0.2, "worse"),
             report("sums-4-shot", "number", 0.0, 0.0, "no difference shown", "sums", 4)],
            "worse", "whether it comes back is open with 4 examples (pass@1 0.0% to 0.0%)",
        ),
        (  # as few questions show no difference, and no return either
            [report("sums", "number", 0.6, 0.2, "worse"),
             replace(report("sums-4-shot", "number", 0.6, 0.45, "no difference shown", "sums", 4),
                     change={"pass@1": MetricChange(difference=-0.15, interval=[-0.45, 0.1])})],
            "worse", "is open with 4 examples (pass@1 60.0% to 45.0%)",
        ),
        (  # a loss of one ability is said before a gain of another
            [report("sums", "number", 0.2, 0.6, "better"), report("wiki", "loss", 3.0, 3.4, "worse")],
            "forgetting", "wiki: forgetting",
        ),
    ],
)  # fmt: skip
def test_the_conclusion_follows_the_signs(reports: list[TaskReport], verdict: str, sign: str | None) -> None:
    found = diagnosed(reports)
    assert found is not None
    assert found.verdict == verdict
    assert sign is None or any(sign in each for each in found.signs), found.signs
    assert (found.cure is None) == (verdict in ("better", "no difference shown"))


def test_what_was_cut_off_is_not_forgotten() -> None:
    """A model that has learned to write down its steps needs more tokens than its base."""
    plain = report("sums", "number", 0.6, 0.2, "worse")
    shots = report("sums-4-shot", "number", 0.6, 0.1, "worse", "sums", 4)
    moved = {"ended": (-0.5, -0.6, -0.4), "repetition": (0.0, -0.01, 0.01)}

    def cut(repeated: float) -> TaskReport:
        changes = {name: MetricChange(difference=d + repeated, interval=[low + repeated, high + repeated])
                   for name, (d, low, high) in moved.items()}  # fmt: skip
        return replace(plain, base={**(plain.base or {}), "ended": 1.0}, tuned={**plain.tuned, "ended": 0.5},
                       change={**(plain.change or {}), **changes}, max_new_tokens=64)  # fmt: skip

    found = diagnosed([cut(0.0), shots])
    assert found is not None
    assert found.verdict == "worse"
    assert "50% of its answers were cut off at 64 tokens" in found.signs[0]
    # One that goes in circles would not come to an end with more tokens either.
    assert diagnosed([cut(0.3), shots]).verdict == "forgetting"  # type: ignore[union-attr]


def test_an_adapter_that_changes_nothing_is_named() -> None:
    still = MetricChange(difference=0.0, interval=[0.0, 0.0])
    same = TaskReport(
        name="a", form="number", path="a", questions="x", items=9, seed=0, base={"pass@1": 0.5}, tuned={"pass@1": 0.5},
        change={"pass@1": still}, verdict="no difference shown", reason="", differing=0,
    )  # fmt: skip
    found = diagnosed([same])
    assert found is not None
    assert found.verdict == "idle adapter"
    # As many are right as before, and the answers are others: the adapter does something.
    assert diagnosed([replace(same, differing=3)]).verdict == "no difference shown"  # type: ignore[union-attr]
    letters = replace(same, form="choices", base={"accuracy": 0.5}, tuned={"accuracy": 0.5}, change={"accuracy": still})
    assert diagnosed([letters]).verdict == "no difference shown"  # type: ignore[union-attr]
    assert diagnosed([report("b", "number", 0.1, 0.1, "better")]).verdict == "better"  # type: ignore[union-attr]
    alone = TaskReport(name="a", form="number", path="a", questions="x", items=9, seed=0, tuned={"pass@1": 0.5})
    assert diagnosed([alone]) is None


# ------------------------------------------------------------------ the outlook of RL


def test_what_rl_can_expect() -> None:
    assert rl_outlook(0.0, 0.0, 8, 200).startswith("RL will likely fail: pass@1 is 0.0%")
    assert rl_outlook(0.10, 0.12, 8, 500).startswith("RL will struggle: pass@8 is 12.0%")
    assert rl_outlook(0.3, 0.7, 8, 200).startswith("RL has enough right answers")
    open_ = rl_outlook(0.04, 0.3, 8, 50)
    assert open_.startswith("whether RL can work is open with 50 questions")
    assert "about" in open_


@given(st.floats(0, 1), st.integers(1, 5000))
def test_an_interval_holds_its_share(share: float, count: int) -> None:
    low, high = wilson(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert wilson(share, 4 * count)[1] - wilson(share, 4 * count)[0] <= high - low + 1e-12


def test_as_many_questions_as_are_named_do_tell() -> None:
    for share, threshold in ((0.02, 0.05), (0.04, 0.05), (0.3, 0.2), (0.21, 0.2)):
        needed = questions_needed(share, threshold)
        low, high = wilson(share, needed)
        assert high < threshold or low >= threshold
        low, high = wilson(share, needed // 2)
        assert low < threshold <= high or needed <= 10
    assert questions_needed(0.05, 0.05 + 1e-9) == 100_000


def test_going_in_circles_is_repetition() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7, 8] * 50) > 0.9
    assert repetition([1, 2]) == 0
