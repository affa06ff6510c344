import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.data.packing import Strategy, pack

capacities = st.integers(1, 64)
cases = capacities.flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=80), st.just(c)))


@given(cases, st.sampled_from(["bfd", "ffd", "none"]))
def test_every_document_is_in_one_bin_and_no_bin_overflows(case: tuple[list[int], int], strategy: Strategy) -> None:
    lengths, capacity = case
    sequences = pack(lengths, capacity, strategy=strategy)
    assert sorted(index for each in sequences for index in each) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in each) <= capacity for each in sequences)


def by_definition(lengths: list[int], capacity: int, strategy: Strategy) -> list[int]:
    """Sizes of the sequences, in quadratic time."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(left) if room >= length]
        if fitting:
            chosen = fitting[0] if strategy == "ffd" else min(fitting, key=lambda i: left[i])
            left[chosen] -= length
        else:
            left.append(capacity - length)
    return sorted(capacity - room for room in left)


@given(cases, st.sampled_from(["bfd", "ffd"]))
def test_it_is_what_its_name_says(case: tuple[list[int], int], strategy: Strategy) -> None:
    lengths, capacity = case
    sizes = sorted(sum(lengths[index] for index in each) for each in pack(lengths, capacity, strategy=strategy))
    assert sizes == by_definition(lengths, capacity, strategy)


def test_long_tails_are_packed_almost_perfectly() -> None:
    rng = random.Random(0)
    lengths = [max(1, min(4096, int(rng.lognormvariate(6, 1)))) for _ in range(50_000)]
    assert len(pack(lengths, 4096)) <= 1.01 * math.ceil(sum(lengths) / 4096)


def test_none_keeps_every_document_apart_and_in_order() -> None:
    assert pack([3, 1, 2], 3, strategy="none") == [[0], [1], [2]]


@pytest.mark.parametrize("length", [0, 9])
def test_a_document_that_fits_no_bin_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens"):
        pack([4, length], 8)
