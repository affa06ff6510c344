"""Draws random trees of prefixes, for the tests of attention over them."""

from __future__ import annotations

from hypothesis import strategies as st

from qlora_sft.model.attention_tree import Tree


@st.composite
def trees(draw: st.DrawFn, longest: int = 9) -> Tree:
    """Draws a tree, depth first: the parent of a segment is one of the path to the segment before it, or none."""
    lengths, parents = [], []
    path: list[int] = []
    for number in range(draw(st.integers(1, 9))):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        lengths.append(draw(st.integers(1, longest)))
        path = [*path, number]
    return Tree(tuple(lengths), tuple(parents))


def paths(tree: Tree) -> list[list[int]]:
    """Returns for every segment the numbers of those above it, from the first on, and its own."""
    found: list[list[int]] = []
    for number, parent in enumerate(tree.parents):
        found.append([*(found[parent] if parent >= 0 else []), number])
    return found
