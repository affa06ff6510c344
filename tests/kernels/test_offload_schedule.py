"""The order of copies on a simulated device, over numbers of layers, slots, lags, depths and random durations."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qlora_kernels.offload import HostSlab, Schedule
from qlora_kernels.offload.schedule import Ticket, TicketRef
from simulated_device import SimulatedEngine
from torch import Tensor

SIZE = 4


class Step:
    """Forward and backward of one row on the simulated device, checked after every layer."""

    def __init__(self, schedule: Schedule, engine: SimulatedEngine, resident: set[int], n_layers: int, row: int):
        self.schedule, self.engine, self.resident = schedule, engine, resident
        self.n_layers, self.row = n_layers, row
        self.packed: dict[int, Ticket | Tensor] = {}
        self.before: dict[int, TicketRef | None] = {}

    def value(self, layer: int) -> float:
        return 1000.0 * self.row + layer

    def forward(self) -> None:
        self.schedule.begin()
        for layer in range(self.n_layers):
            tensor = torch.full((SIZE,), self.value(layer))
            self.engine.computed[tensor.data_ptr()] = self.engine.mark()
            if layer in self.resident:
                self.before[layer] = self.schedule.newest
            else:
                self.packed[layer] = self.schedule.pack(tensor)
            del tensor
            self.engine.work()
            self.check_counts()

    def backward(self, layers: int | None = None) -> None:
        for layer in list(reversed(range(self.n_layers)))[:layers]:
            first = len(self.engine.loads)
            if layer in self.resident:
                self.schedule.fetch_before(self.before[layer])
                self.engine.work()
            else:
                tensor = self.schedule.unpack(self.packed[layer])
                assert tensor.tolist() == [self.value(layer)] * SIZE
                self.check_counts()
                self.engine.use(tensor)
            loaded = self.engine.loads[first:]
            assert loaded == sorted(loaded, reverse=True), f"not in the order of need: {loaded}"
            assert all(value <= self.value(layer) for value in loaded)
            self.check_counts()

    def check_counts(self) -> None:
        leaving = [held for held in self.schedule._leaving if held.tensor is not None]
        ahead = [held for held in self.schedule._ahead if held.tensor is not None]
        assert len(leaving) <= self.schedule.lag
        assert len(ahead) <= self.schedule.depth
        assert not self.engine.faults, self.engine.faults


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_order_of_events_is_wrong(data: st.DataObject) -> None:
    n_layers = data.draw(st.integers(1, 12), "layers")
    slots = data.draw(st.integers(0, 2 * n_layers), "slots")
    resident = data.draw(st.sets(st.integers(0, n_layers - 1)), "layers that stay")
    lag, depth = data.draw(st.integers(0, 4), "lag"), data.draw(st.integers(0, 4), "depth")
    plan = data.draw(st.lists(st.sampled_from(["step", "twice", "dropped", "broken", "two"]), min_size=1, max_size=4))
    engine = SimulatedEngine(Random(data.draw(st.integers(0, 1000), "durations")))
    schedule = Schedule(HostSlab(slots, SIZE * 4, torch.device("cpu")), engine, lag=lag, depth=depth)
    for number, kind in enumerate(plan):
        steps = [Step(schedule, engine, resident, n_layers, 2 * number + i) for i in range(2 if kind == "two" else 1)]
        for step in steps:
            step.forward()
        for step in steps if kind != "dropped" else []:
            step.backward(data.draw(st.integers(0, n_layers), "layers done") if kind == "broken" else None)
            if kind == "twice":
                step.backward()
        del step, steps
        assert schedule.slab.taken == 0
        assert not schedule._leaving
        assert not schedule._ahead
        assert not engine.faults, engine.faults


def test_all_copies_in_but_the_first_run_during_other_layers() -> None:
    """With copies as fast as layers, nothing but the pipeline's beginning is waited for, and a layer that stays hides
    even that."""
    engine = SimulatedEngine(Random(0))
    engine.work = lambda: setattr(engine, "compute", engine.compute + 1.0)  # type: ignore[method-assign]
    engine._copy_time = lambda: 0.9  # type: ignore[method-assign]
    engine.new = torch.empty_like  # type: ignore[method-assign, assignment]
    schedule = Schedule(HostSlab(8, SIZE * 4, torch.device("cpu")), engine, lag=2, depth=2)
    step = Step(schedule, engine, {8, 9}, 10, 0)
    step.forward()
    assert engine.compute == pytest.approx(10.0)
    step.backward()
    assert engine.compute == pytest.approx(20.0)
    # The last two were still held from the forward.
    assert engine.loads == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


def test_the_simulation_sees_a_copy_that_overtakes_the_filling_of_its_memory() -> None:
    """The mark that a copy in waits for has to be made after the new tensor."""
    engine = SimulatedEngine(Random(0))
    schedule = Schedule(HostSlab(4, SIZE * 4, torch.device("cpu")), engine, lag=0, depth=1)
    tensor = torch.zeros(SIZE)
    engine.computed[tensor.data_ptr()] = engine.compute
    ticket = schedule.pack(tensor)
    assert isinstance(ticket, Ticket)
    early = engine.mark()
    engine.compute += 0.1
    engine.load(ticket.view, engine.new(ticket.view), [ticket.saved, early])
    assert any("still use or fill it" in each for each in engine.faults)


@pytest.mark.parametrize(
    ("method", "fault"),
    [("wait", "before it is copied"), ("mark", "before it is computed")],
)
def test_the_simulation_sees_a_missing_event(method: str, fault: str) -> None:
    engine = SimulatedEngine(Random(0))
    if method == "wait":
        engine.wait = lambda event: None  # type: ignore[method-assign]
    else:
        engine.mark = lambda: 0.0  # type: ignore[method-assign]
    schedule = Schedule(HostSlab(4, SIZE * 4, torch.device("cpu")), engine, lag=0, depth=1)
    engine.work()
    tensor = torch.zeros(SIZE)
    engine.computed[tensor.data_ptr()] = engine.compute
    ticket = schedule.pack(tensor)
    del tensor, ticket
    assert any(fault in each for each in engine.faults)
