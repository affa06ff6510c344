"""Every tier gives torch's own gradients bit for bit, and no slot is lost whatever happens to the graph."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_cases import WIDTH, Stack, assert_equal, checkpointed, row, schedule_for, step
from qlora_kernels.offload import ATTENTION_OPERATORS, HostSlab, layer_functions, slab_bytes
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = 24
# Rows of unlike lengths, so that a slot holds less than its size; one document, several, several of one token.
ROWS = [(TOKENS, ()), (17, (0, 5, 6, 17)), (TOKENS, (0, 1, 2, 23, 24))]
MIXTURES = [
    ["offload"] * 5,
    ["keep"] * 5,
    ["attention"] * 5,
    ["offload", "offload", "checkpoint", "attention", "keep"],
    ["offload", "offload", "offload", "keep", "keep"],
    ["keep", "offload", "attention", "offload", "checkpoint"],
]


def rows(dtype: torch.dtype = torch.float32) -> list[Any]:
    return [(row(tokens, seed, dtype), bounds) for seed, (tokens, bounds) in enumerate(ROWS)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiers", MIXTURES, ids=lambda tiers: "-".join(tier[0] for tier in tiers))
def test_gradients_are_those_of_plain_checkpointing(tiers: list[Any], dtype: torch.dtype, dropout: float) -> None:
    """Packed and not, accumulated over rows."""
    stack = Stack(5, dropout, dtype)
    expected = step(stack, checkpointed(5), rows(dtype))
    schedule = schedule_for(tiers, TOKENS, dtype.itemsize)
    assert_equal(step(stack, layer_functions(tiers, schedule), rows(dtype)), expected)
    assert (schedule.slab.taken, schedule.stayed) == (0, 0)


@settings(max_examples=25, deadline=None)
@given(
    tiers=st.lists(st.sampled_from(["keep", "attention", "checkpoint", "offload"]), min_size=1, max_size=6),
    slots=st.integers(0, 6),
    lag=st.integers(0, 3),
    depth=st.integers(0, 3),
)
def test_no_mixture_and_no_shortage_changes_a_bit(tiers: list[Any], slots: int, lag: int, depth: int) -> None:
    stack = Stack(len(tiers), 0.1)
    expected = step(stack, checkpointed(len(tiers)), rows())
    schedule = schedule_for(tiers, TOKENS, 4, slots=slots, lag=lag, depth=depth)
    assert_equal(step(stack, layer_functions(tiers, schedule), rows()), expected)
    assert schedule.slab.taken == 0
    assert schedule.stayed == len(ROWS) * max(0, tiers.count("offload") - slots)


def test_a_graph_may_be_used_twice() -> None:
    tiers: list[Any] = ["offload", "offload", "offload", "checkpoint", "keep"]
    stack = Stack(5)

    def twice(functions: list[Any]) -> dict[str, torch.Tensor]:
        loss = stack(row(TOKENS, 0), functions)
        loss.backward(retain_graph=True)
        loss.backward()
        return stack.gradients()

    schedule = schedule_for(tiers, TOKENS, 4)
    assert_equal(twice(layer_functions(tiers, schedule)), twice(checkpointed(5)))
    assert schedule.slab.taken == 0


def test_torch_refuses_a_second_backward_where_attention_is_kept() -> None:
    loss = Stack(1)(row(TOKENS, 0), layer_functions(["attention"], None))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only allowed to backward once"):
        loss.backward()


@pytest.mark.parametrize("first", [0, 1])
def test_two_graphs_at_once(first: int) -> None:
    """Both forwards before either backward, in either order of the backwards."""
    tiers: list[Any] = ["offload", "offload", "offload", "offload", "keep"]
    stack = Stack(5, 0.1)

    def both(functions: list[Any]) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        losses = [stack(row(TOKENS, seed), functions) for seed in (0, 1)]
        found = []
        for loss in (losses[first], losses[1 - first]):
            loss.backward()
            found.append(stack.gradients())
        return found

    schedule = schedule_for(tiers, TOKENS, 4, slots=8)
    for found, expected in zip(both(layer_functions(tiers, schedule)), both(checkpointed(5)), strict=True):
        assert_equal(found, expected)
    assert (schedule.slab.taken, schedule.stayed) == (0, 0)


def test_an_exception_in_a_backward_leaves_no_slot_taken() -> None:
    """Without the garbage collector: an out-of-memory error is often followed by a second try at once."""
    tiers: list[Any] = ["offload"] * 5
    stack = Stack(5)
    expected = step(stack, checkpointed(5), rows())
    schedule = schedule_for(tiers, TOKENS, 4)
    functions = layer_functions(tiers, schedule)

    def broken(gradient: torch.Tensor) -> None:
        raise ArithmeticError("in the middle")

    def fail() -> None:
        hook = stack.layers[2].down.weight.register_hook(broken)
        with pytest.raises(ArithmeticError, match="in the middle"):
            step(stack, functions, rows())
        hook.remove()
        stack.zero_grad()

    gc.disable()
    try:
        fail()
        schedule.begin()
        assert schedule.slab.taken == 0
    finally:
        gc.enable()
    assert_equal(step(stack, functions, rows()), expected)
    assert schedule.stayed == 0


def test_a_graph_that_is_dropped_gives_its_slots_back() -> None:
    schedule = schedule_for(["offload"] * 4, TOKENS, 4)
    functions = layer_functions(["offload"] * 4, schedule)
    loss = Stack(4)(row(TOKENS, 0), functions)
    assert schedule.slab.taken == 4
    del loss
    assert schedule.slab.taken == 0


def test_without_gradients_nothing_is_offloaded() -> None:
    schedule = schedule_for(["offload"] * 3, TOKENS, 4)
    with torch.no_grad():
        loss = Stack(3)(row(TOKENS, 0), layer_functions(["offload"] * 3, schedule))
        assert schedule.slab.taken == schedule.stayed == 0
    assert torch.equal(loss, Stack(3)(row(TOKENS, 0), checkpointed(3)).detach())


def test_an_input_changed_in_place_is_an_error_not_a_wrong_gradient() -> None:
    stack = Stack(2)
    schedule = schedule_for(["offload"] * 2, TOKENS, 4)
    functions = layer_functions(["offload"] * 2, schedule)
    hidden = row(TOKENS, 0) * 1
    result = functions[0](stack.layers[0], hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        result.sum().backward()


class Attention(TorchDispatchMode):
    """How often attention is computed, not counting its own backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.name() in ATTENTION_OPERATORS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tier", "times"), [("keep", 1), ("attention", 1), ("checkpoint", 2), ("offload", 2)])
def test_which_tiers_compute_attention_again(tier: Any, times: int) -> None:
    stack = Stack(3)
    functions = layer_functions([tier] * 3, schedule_for([tier] * 3, TOKENS, 4))
    with Attention() as seen:
        stack(row(TOKENS, 0), functions, (0, 10, TOKENS)).backward()
    assert seen.calls == 3 * 2 * times


def test_attention_with_dropout_is_computed_again() -> None:
    """Saved, it would draw no random numbers the second time, and every later dropout would differ."""
    from qlora_kernels.offload.checkpoint import _attention_is_saved
    from torch.utils.checkpoint import CheckpointPolicy

    q = torch.zeros(1, 1, 2, 8)
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    policies = [
        _attention_is_saved(None, attend, q, q, q, dropout_p=0.0),
        _attention_is_saved(None, attend, q, q, q, 0.1),
        _attention_is_saved(None, attend, q, q, q, dropout_p=0.1),
    ]
    saved, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    assert policies == [saved, again, again]


def test_the_slab_has_exactly_the_bytes_of_the_formula() -> None:
    for n_layers, tokens in ((32, 1000), (7, 513), (1, 3)):
        slab = HostSlab(n_layers, slab_bytes(1, tokens, WIDTH, 2), torch.device("cpu"))
        assert slab.nbytes == slab.memory.untyped_storage().nbytes() == n_layers * tokens * WIDTH * 2
        assert slab.nbytes == slab_bytes(n_layers, tokens, WIDTH, 2)


def test_slots_do_not_overlap_and_end_with_the_slab() -> None:
    slab = HostSlab(3, 24, torch.device("cpu"))
    like = torch.empty(2, 3)
    taken = [slab.take() for _ in range(4)]
    assert sorted(taken[:3]) == [0, 1, 2]
    assert taken[3] is None
    views = [slab.view(slot, like) for slot in taken[:3]]
    for number, view in enumerate(views):
        view.fill_(number)
    assert [view.tolist() for view in views] == [[[n] * 3] * 2 for n in (0.0, 1.0, 2.0)]
    slab.close()
    assert slab.nbytes == slab.slots == 0
    assert slab.take() is None
    slab.give_back(taken[0])  # a graph that outlived it
    assert slab.take() is None


def test_what_does_not_fit_stays_and_is_reported_once() -> None:
    told: list[str] = []
    schedule = schedule_for(["offload"] * 3, TOKENS, 4, slots=1, warn=told.append)
    stack = Stack(3)
    functions = layer_functions(["offload"] * 3, schedule)
    for _ in range(2):
        step(stack, functions, rows())
    assert schedule.stayed == 2 * 3 * 2
    assert len(told) == 1
    assert "all 1 slots are taken" in told[0]
    long: list[str] = []
    schedule = schedule_for(["offload"] * 3, TOKENS - 1, 4, warn=long.append)
    expected = step(stack, checkpointed(3), rows())
    assert_equal(step(stack, layer_functions(["offload"] * 3, schedule), rows()), expected)
    assert len(long) == 1
    assert "no slot has its size" in long[0]
