"""The longest row: what is found fits, one token more does not, and more of anything never shortens it."""

from hypothesis import given, settings
from hypothesis import strategies as st
from qlora_kernels.offload.tiers import LayerBytes, choose_tiers, peak_bytes

from qlora_sft.plan.activations import SequenceBytes
from qlora_sft.plan.split import fit_card, longest_sequence


def row_of(per_token: tuple[int, int, int, int]) -> SequenceBytes:
    inputs, attention, more, backward = per_token

    def row(tokens: int) -> tuple[LayerBytes, int]:
        kept = (inputs + attention + more) * tokens
        return LayerBytes(inputs * tokens, attention * tokens, kept, backward * tokens), 3 * inputs * tokens

    return row


PER_TOKEN = st.tuples(*(st.integers(1, 50) for _ in range(4)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), PER_TOKEN, st.integers(0, 20_000), st.integers(0, 8_000))
def test_the_longest_row_is_where_choosing_tiers_stops_finding_any(
    layers: int, per_token: tuple[int, int, int, int], budget: int, host: int
) -> None:
    row = row_of(per_token)

    def found(tokens: int) -> bool:
        layer, loss = row(tokens)
        try:
            choose_tiers(layers, layer, budget, host, loss=loss)
        except ValueError:
            return False
        return True

    tokens = longest_sequence(layers, row, budget, host)
    assert not found(tokens + 1)
    assert tokens == 0 or found(tokens)


def test_the_split_of_a_card_fits_it_and_its_host_memory() -> None:
    row = row_of((4096, 5000, 60_000, 40_000))
    before = 0
    for gib in (8, 16, 48):
        fit = fit_card(gib, 32, row, residents=5 * 2**30, host_budget=6 * 2**30)
        assert fit.choice is not None
        layer, loss = row(fit.tokens)
        assert peak_bytes(fit.choice.tiers, layer, loss) == fit.choice.gpu_bytes < (gib - 5) * 2**30
        assert fit.choice.host_bytes <= 6 * 2**30
        assert fit.tokens > before
        before = fit.tokens
    assert fit_card(8, 32, row, residents=9 * 2**30, host_budget=0).tokens == 0
