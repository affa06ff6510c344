"""FlexAttention is captured as one graph, with caps and windows as constants and lengths as variables.

No GPU is needed: a backend of the test's own keeps the graphs that torch.compile hands it and runs them as they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_sft.model import attention_capped
from qlora_sft.model.attention_capped import Scores, compiled_flex, flex_documents, plain_documents
from qlora_sft.model.attention_tree import remember_tree

LIMIT = 8
"""Compilations of one function that torch allows; with ``fullgraph`` the next one is an error."""


class Graphs:
    """A backend for torch.compile that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.seen.append(graph)
        return graph.forward

    def symbolic_floats(self) -> list[str]:
        values = [node.meta.get("example_value") for graph in self.seen for node in graph.graph.nodes]
        scalars = [x for x in values if isinstance(x, torch.Tensor) and x.ndim == 0 and x.dtype.is_floating_point]
        return [str(x) for x in [*scalars, *(x for x in values if isinstance(x, torch.SymFloat))]]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    torch._dynamo.reset()
    backend = Graphs()
    monkeypatch.setattr(attention_capped, "plain_flex", lambda: compiled_flex(backend))
    return backend


def attend(length: int, window: int | None, softcap: float | None, with_sinks: bool, tree: bool = False) -> None:
    """Runs documents, or a tree of three segments, through the compiled function and compares with the textbook."""
    torch.manual_seed(length)
    bounds = torch.tensor([0, length // 3, length - 9, length], dtype=torch.int32)
    if tree:
        remember_tree(bounds, (bounds[1:] - bounds[:-1]).tolist(), (-1, 0, 0))
    q, k, v = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))
    sinks = torch.randn(4) if with_sinks else None
    ours = flex_documents(q, k, v, bounds, Scores(0.3, window, softcap, sinks))
    theirs = plain_documents(q, k, v, bounds, Scores(0.3, window, softcap, sinks))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(3.0, False), (None, True), (3.0, True)])
def test_lengths_are_variables_and_nothing_else_is(
    graphs: Graphs, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    attend(300, window, softcap, with_sinks)
    attend(200, window, softcap, with_sinks)
    compiled = len(graphs.seen)
    assert compiled == 2
    for length in (171, 260, 400):
        attend(length, window, softcap, with_sinks)
    assert len(graphs.seen) == compiled
    assert not graphs.symbolic_floats()


def test_a_tree_is_compiled_as_documents_are(graphs: Graphs) -> None:
    for length in (300, 200, 171, 260):
        attend(length, 40, None, False, tree=True)
        attend(length, 40, None, False)
    assert len(graphs.seen) == 2
    assert not graphs.symbolic_floats()


def test_another_cap_and_another_window_are_constants_too(graphs: Graphs) -> None:
    for softcap, window in ((3.0, 40), (50.0, 40), (50.0, 64), (30.0, 100)):
        attend(200, window, softcap, False)
    assert not graphs.symbolic_floats()


def test_a_model_with_two_kinds_of_layers_stays_below_the_limit(graphs: Graphs) -> None:
    """As Gemma 2 trains and is evaluated: layers with and without a window, gradients on and off, many lengths."""
    for length in (300, 200, 171, 260, 400):
        for window in (40, None):
            attend(length, window, 50.0, False)
            with torch.no_grad():
                attend(length, window, 50.0, False)
    assert len(graphs.seen) <= LIMIT
