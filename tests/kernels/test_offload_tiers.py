"""The peak of a split against a simulation event by event; the chosen split against all splits there are."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qlora_kernels.offload import LayerBytes, Tier, choose_tiers, describe, peak_bytes, slab_bytes
from qlora_kernels.offload.tiers import DEPTH, LAG, TIERS


def simulated_peak(tiers: list[Tier], layer: LayerBytes, loss: int) -> int:
    """Every allocation of a step by name, with the most that were alive at once."""
    alive: dict[str, int] = {}
    peak = 0

    def note() -> None:
        nonlocal peak
        peak = max(peak, sum(alive.values()))

    leaving: list[str] = []
    for number, tier in enumerate(tiers):
        alive[f"stored {number}"] = layer.stored(tier)
        if tier == "offload":
            leaving.append(f"input {number}")
            alive[leaving[-1]] = layer.input
            while len(leaving) > LAG:
                del alive[leaving.pop(0)]
    alive["loss"] = loss
    note()
    del alive["loss"]
    for number in reversed(range(len(tiers))):
        before = [n for n in range(number) if tiers[n] == "offload"][-DEPTH:]
        for name in [name for name in alive if name.startswith("input")]:
            del alive[name]
        alive |= {f"input {n}": layer.input for n in before}
        alive["restored"] = layer.kept - layer.stored(tiers[number])
        alive["backward"] = layer.backward
        note()
        for name in ("restored", "backward", f"stored {number}"):
            del alive[name]
    assert not alive
    return peak


@st.composite
def layers(draw: st.DrawFn) -> LayerBytes:
    input, attention = draw(st.integers(1, 20)), draw(st.integers(0, 20))
    return LayerBytes(input, attention, input + attention + draw(st.integers(0, 100)), draw(st.integers(0, 60)))


@settings(max_examples=300, deadline=None)
@given(tiers=st.lists(st.sampled_from(TIERS), min_size=1, max_size=10), layer=layers(), loss=st.integers(0, 300))
def test_the_peak_is_that_of_a_simulated_step(tiers: list[Tier], layer: LayerBytes, loss: int) -> None:
    assert peak_bytes(tiers, layer, loss) == simulated_peak(tiers, layer, loss)


@settings(max_examples=150, deadline=None)
@given(
    n_layers=st.integers(1, 4), layer=layers(), budget=st.integers(0, 600), host=st.integers(0, 80),
    loss=st.integers(0, 100), share=st.sampled_from([0.0, 0.1, 0.5]),
)  # fmt: skip
def test_no_split_that_fits_recomputes_less(
    n_layers: int, layer: LayerBytes, budget: int, host: int, loss: int, share: float
) -> None:
    usable = [tier for tier in TIERS if layer.attention or tier != "attention"]
    fitting = [
        (sum({"keep": 0.0, "attention": 1 - share}.get(tier, 1.0) for tier in tiers), tiers.count("offload"))
        for tiers in product(usable, repeat=n_layers)
        if simulated_peak(list(tiers), layer, loss) <= budget and tiers.count("offload") * layer.input <= host
    ]
    if not fitting:
        with pytest.raises(ValueError, match="activations do not fit"):
            choose_tiers(n_layers, layer, budget, host, loss=loss, attention_share=share)
        return
    choice = choose_tiers(n_layers, layer, budget, host, loss=loss, attention_share=share)
    recomputed = sum({"keep": 0.0, "attention": 1 - share}.get(tier, 1.0) for tier in choice.tiers)
    assert (pytest.approx(recomputed), choice.tiers.count("offload")) == min(fitting)
    assert choice.gpu_bytes == peak_bytes(choice.tiers, layer, loss) <= budget
    assert choice.host_bytes == choice.tiers.count("offload") * layer.input <= host


@settings(max_examples=60, deadline=None)
@given(n_layers=st.integers(5, 40), layer=layers(), budget=st.integers(0, 1500), loss=st.integers(0, 100))
def test_no_more_layers_are_offloaded_than_needed(n_layers: int, layer: LayerBytes, budget: int, loss: int) -> None:
    """Of deep models: for as many fast layers as were chosen, one offloaded layer less does not fit."""
    try:
        tiers = choose_tiers(n_layers, layer, budget, 10**6, loss=loss).tiers
    except ValueError:
        for offloaded in range(n_layers + 1):
            least: list[Tier] = ["offload"] * offloaded + ["checkpoint"] * (n_layers - offloaded)  # type: ignore[assignment]
            assert peak_bytes(least, layer, loss) > budget
        return
    fast = [tier for tier in tiers if tier in ("attention", "keep")]
    rest = n_layers - len(fast)
    for offloaded in range(tiers.count("offload")):
        fewer: list[Tier] = ["offload"] * offloaded + ["checkpoint"] * (rest - offloaded) + fast  # type: ignore[assignment]
        assert peak_bytes(fewer, layer, loss) > budget


def test_the_formula_of_the_slab() -> None:
    """Llama-3.1-8B at 100,000 tokens in bfloat16: 24.4 GiB."""
    assert slab_bytes(32, 100_000, 4096, 2) == 32 * 100_000 * 4096 * 2
    assert round(slab_bytes(32, 100_000, 4096, 2) / 2**30, 1) == 24.4


def test_a_split_is_described_in_the_order_of_the_forward() -> None:
    tiers: list[Tier] = ["offload", "offload", "checkpoint", "keep"]
    assert describe(tiers) == "2 offload, 1 checkpoint, 1 keep"
