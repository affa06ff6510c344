import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.data.packing import pack

capacities = st.integers(1, 64)
cases = capacities.flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=80), st.just(c)))


@given(cases)
def test_every_document_is_in_one_bin_and_no_bin_overflows(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = pack(lengths, capacity)
    assert sorted(index for each in bins for index in each) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in each) <= capacity for each in bins)


def best_fit_decreasing_bin_sizes(lengths: list[int], capacity: int) -> list[int]:
    """The definition, in quadratic time."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting, key=lambda i: left[i])] -= length
        else:
            left.append(capacity - length)
    return sorted(capacity - room for room in left)


@given(cases)
def test_it_is_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    sizes = sorted(sum(lengths[index] for index in each) for each in pack(lengths, capacity))
    assert sizes == best_fit_decreasing_bin_sizes(lengths, capacity)


def test_none_keeps_every_document_apart_and_in_order() -> None:
    assert pack([3, 1, 2], 3, strategy="none") == [[0], [1], [2]]


@pytest.mark.parametrize("length", [0, 9])
def test_a_document_that_fits_no_bin_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens"):
        pack([4, length], 8)
