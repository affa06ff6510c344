"""How alike answers are: BLEU by its definition, and what identical and unlike answers give."""

from __future__ import annotations

import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.evaluation.diversity import bleu, diversity, grams, others

ANSWER = st.lists(st.integers(0, 5), max_size=12)


def test_bleu_is_that_of_the_definition() -> None:
    """The cat of Papineni et al. 2002: seven times "the" has two in the reference that has it most often."""
    the, cat, sat, on, mat, there, is_, a = range(8)
    references = [grams([the, cat, is_, on, the, mat]), grams([there, is_, a, cat, on, the, mat])]
    # Longer than the closest reference by none: 7 tokens; unigrams 2/7, then a tenth of 6, 5 and 4.
    wanted = math.exp(sum(map(math.log, (2 / 7, 0.1 / 6, 0.1 / 5, 0.1 / 4))) / 4)
    assert bleu(grams([the] * 7), references) == pytest.approx(wanted)
    # Five tokens are closest to six: e^(1 - 6/5); 4/5, 2/4, and of three and four in a row one in three and none.
    short = bleu(grams([the, cat, sat, the, mat]), [grams([the, cat, is_, on, the, mat])])
    assert short == pytest.approx(
        math.exp((math.log(0.8) + math.log(0.5) + math.log(0.1 / 3) + math.log(0.1 / 2)) / 4 - 0.2)
    )
    assert bleu(grams([]), [grams([1])]) == 0
    assert bleu(grams([]), [grams([1]), grams([])]) == 1
    assert bleu(grams([1]), []) == 0


@pytest.mark.parametrize("samples", [1, 2])
def test_the_memory_does_not_grow_with_the_number_of_questions(samples: int) -> None:
    """The n-grams of one answer of 20 tokens take some 5 KB, its two figures less than 200 bytes."""
    peaks = []
    for questions in (40, 60):
        answers = [[(7 * number + place) % 97 for place in range(20)] for number in range(questions * samples)]
        tracemalloc.start()
        diversity(answers, samples)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 20 * 500


@given(st.lists(ANSWER, min_size=2, max_size=6).filter(all))
def test_the_same_answer_twice_is_as_alike_as_can_be(answers: list[list[int]]) -> None:
    twice = [answer for answer in answers for _ in range(2)]
    figures = diversity(twice, 2)
    assert figures["self-BLEU"] == pytest.approx([1.0] * len(answers))
    alone = diversity(answers, 1)
    assert all(0 <= value <= 1 + 1e-9 for each in alone.values() for value in each)
    assert all(
        2 * doubled <= 1 + 1e-9 or not len(answer) > 1
        for doubled, answer in zip(figures["distinct-2"], answers, strict=True)
    )


def test_answers_to_one_question_are_compared_with_each_other_else_with_those_to_others() -> None:
    unlike = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [1, 2, 3, 4, 5], [11, 12, 13, 14, 15]]
    assert diversity(unlike, 2)["self-BLEU"][0] < 0.05
    assert diversity(unlike, 2)["distinct-2"] == [1.0, 1.0]
    assert [value > 0.9 for value in diversity(unlike, 1)["self-BLEU"]] == [True, False, True, False]
    assert diversity([[3, 3, 3]], 1) == {"distinct-2": [0.5], "self-BLEU": [0.0]}


@given(st.integers(2, 100), st.data())
def test_an_answer_is_never_its_own_reference(total: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, total - 1))
    found = others(number, range(number, number + 1), total)
    assert number not in found
    assert len(set(found)) == len(found) == min(32, total - 1)
    assert others(4, range(3, 6), total) == [3, 5]
