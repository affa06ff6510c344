"""What only a GPU can show: real streams, no waiting of the host, and the memory that the formula promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from offload_cases import WIDTH, Stack, assert_equal, checkpointed, row, schedule_for, step
from qlora_kernels.offload import HostSlab, LayerBytes, engine_for, layer_functions, peak_bytes
from qlora_kernels.offload.tiers import LAG
from torch.nn.attention import SDPBackend, sdpa_kernel
from waiting import no_waiting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

TOKENS = 4096
MIXTURES = [
    ["offload"] * 6,
    ["offload", "offload", "offload", "checkpoint", "attention", "keep"],
    ["keep", "offload", "attention", "offload", "checkpoint", "offload"],
]


@pytest.fixture
def repeatable_attention() -> Iterator[None]:
    """The only attention on a GPU whose gradients are the same in every run: that in memory-efficient kernels adds in
    the order in which blocks finish (9e-8 of difference between two runs in float32)."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def rows(dtype: torch.dtype) -> list[Any]:
    return [(row(TOKENS, 0, dtype, "cuda"), ()), (row(999, 1, dtype, "cuda"), (0, 500, 999))]


@pytest.mark.usefixtures("repeatable_attention")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiers", MIXTURES, ids=lambda tiers: "-".join(tier[0] for tier in tiers))
def test_gradients_are_those_of_plain_checkpointing(tiers: list[Any], dtype: torch.dtype, dropout: float) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        stack = Stack(6, dropout, dtype).cuda()
        expected = step(stack, checkpointed(6), rows(dtype))
        schedule = schedule_for(tiers, TOKENS, dtype.itemsize, "cuda")
        assert schedule.slab.pinned
        for _ in range(3):  # slots and memory are used again
            assert_equal(step(stack, layer_functions(tiers, schedule), rows(dtype)), expected)
        assert (schedule.slab.taken, schedule.stayed) == (0, 0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("repeatable_attention")
def test_a_slow_copy_is_waited_for() -> None:
    """Copies that are far behind: the streams are kept busy while the layers are queued."""
    tiers: list[Any] = ["offload"] * 6
    stack = Stack(6).cuda()
    expected = step(stack, checkpointed(6), rows(torch.float32))
    schedule = schedule_for(tiers, TOKENS, 4, "cuda")
    engine: Any = schedule.engine
    for stream in (engine.outward, engine.inward):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
    assert_equal(step(stack, layer_functions(tiers, schedule), rows(torch.float32)), expected)


def test_memory_that_torch_fills_is_filled_before_the_copy() -> None:
    """As under ``torch.use_deterministic_algorithms``, while the compute queue is far behind."""
    slab = HostSlab(1, 4_000_000, torch.device("cuda"))
    view = slab.view(0, torch.empty(1_000_000)).fill_(1.0)
    engine = engine_for(torch.device("cuda"))
    torch.use_deterministic_algorithms(True)
    try:
        torch.cuda._sleep(200_000_000)
        tensor = engine.new(view)
        engine.wait(engine.load(view, tensor, [engine.mark()]))
        assert bool((tensor == 1.0).all())
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_host_never_waits() -> None:
    tiers: list[Any] = ["offload", "offload", "offload", "offload", "checkpoint", "keep"]
    stack = Stack(6).cuda()
    functions = layer_functions(tiers, schedule_for(tiers, TOKENS, 4, "cuda"))
    x = row(TOKENS, 0, device="cuda")
    stack(x, functions).backward()
    with no_waiting():
        stack(x, functions).backward()


def test_the_slab_is_registered_as_a_whole_and_let_go() -> None:
    slab = HostSlab(3, 1_000_000, torch.device("cuda"))
    assert slab.pinned
    assert slab.warning is None
    memory = slab.memory
    assert memory.is_pinned()
    assert slab.view(2, torch.empty(250_000)).is_pinned()
    slab.close()
    assert not memory.is_pinned()


@pytest.mark.usefixtures("repeatable_attention")
def test_a_refused_registration_leaves_a_slab_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: 801  # cudaErrorNotSupported

    monkeypatch.setattr(torch.cuda, "cudart", Refuses)
    tiers: list[Any] = ["offload"] * 6
    schedule = schedule_for(tiers, TOKENS, 4, "cuda")
    monkeypatch.undo()
    assert not schedule.slab.pinned
    assert schedule.slab.warning is not None
    assert "CUDA error 801" in schedule.slab.warning
    stack = Stack(6).cuda()
    expected = step(stack, checkpointed(6), rows(torch.float32))
    assert_equal(step(stack, layer_functions(tiers, schedule), rows(torch.float32)), expected)


@pytest.mark.parametrize(
    "tiers", [["offload"] * 8, ["checkpoint"] * 8, ["offload"] * 4 + ["checkpoint"] * 2 + ["keep"] * 2]
)
def test_memory_stays_within_the_formula(tiers: list[Any]) -> None:
    """``kept`` and ``backward`` are measured on one layer, the rest is predicted."""
    tokens = 65536
    stack = Stack(8).cuda()
    layer = measured(stack, tokens)
    schedule = schedule_for(tiers, tokens, 4, "cuda")
    functions = layer_functions(tiers, schedule)
    x = row(tokens, 0, device="cuda")
    for parameter in stack.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stack(x, functions).backward()
    peak = torch.cuda.max_memory_allocated() - before
    # The stack's loss: the output, its square and their gradients.
    assert peak <= peak_bytes(tiers, layer, 4 * layer.input) * 1.08
    assert LAG * layer.input < peak


def measured(stack: Stack, tokens: int) -> LayerBytes:
    stack.layers[0](row(64, 0, device="cuda")).sum().backward()  # cuBLAS takes its workspace
    x = row(tokens, 0, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = stack.layers[0](x)
    size = x.nbytes
    kept = torch.cuda.memory_allocated() - before  # the output, which the next layer keeps, stands for the input
    torch.autograd.grad(output, [x, *stack.layers[0].parameters()], torch.ones_like(output))
    peak = torch.cuda.max_memory_allocated() - before
    return LayerBytes(size, tokens * (WIDTH * 4 + 4 * 4), kept, max(0, peak - kept))
