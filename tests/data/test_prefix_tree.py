"""The tree of shared prefixes: every row is in it, whole and in order, and what is shared is there once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_sft.data.prefix_groups import group_by_prefix
from qlora_sft.data.prefix_tree import BLOCK, Tokens, prefix_tree, tree_tokens

# Rows of few different blocks, and a tail, so that many of them begin alike and some are prefixes of others.
ROW = st.tuples(st.lists(st.integers(1, 3), max_size=4), st.lists(st.integers(1, 2), max_size=BLOCK + 2)).filter(
    lambda parts: bool(parts[0] or parts[1])
)
ROWS = st.lists(ROW, min_size=1, max_size=12)


def tokens_of(parts: tuple[list[int], list[int]]) -> Tokens:
    blocks, tail = parts
    return np.array([block for block in blocks for _ in range(BLOCK)] + tail, dtype=np.int32)


def trie_size(rows: list[Tokens]) -> int:
    """Tokens of the trie whose letters are whole blocks, and of the tails, which are never shared."""
    nodes: set[tuple[int, ...]] = set()
    tails = 0
    for row in rows:
        whole = len(row) // BLOCK
        nodes |= {tuple(row[: BLOCK * (n + 1)].tolist()) for n in range(whole)}
        tails += len(row) - whole * BLOCK
    return BLOCK * len(nodes) + tails


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_every_row_is_a_path_and_every_shared_block_is_there_once(drawn: list[tuple[list[int], list[int]]]) -> None:
    rows = [tokens_of(parts) for parts in drawn]
    tree = prefix_tree(rows)
    for row, path in zip(rows, tree.paths, strict=True):
        pieces = [rows[tree.segments[n].row][tree.segments[n].start : tree.segments[n].end] for n in path]
        assert np.array_equal(np.concatenate(pieces), row)
        assert [tree.segments[n].parent for n in path] == [-1, *path[:-1]]
        assert [tree.segments[n].start for n in path] == [0, *(tree.segments[n].end for n in path[:-1])]
    assert sum(tree.lengths) == trie_size(rows) == tree_tokens(rows)
    assert min(tree.lengths) > 0


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_what_continues_a_segment_stands_behind_it_in_one_stretch(drawn: list[tuple[list[int], list[int]]]) -> None:
    tree = prefix_tree([tokens_of(parts) for parts in drawn])
    below: dict[int, set[int]] = {}
    for number, parent in enumerate(tree.parents):
        assert parent < number
        while parent >= 0:
            below.setdefault(parent, set()).add(number)
            parent = tree.parents[parent]
    for number, continued in below.items():
        assert continued == set(range(number + 1, number + 1 + len(continued)))


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(100, 200))
def test_groups_hold_every_document_once_and_fit(drawn: list[tuple[list[int], list[int]]], capacity: int) -> None:
    rows = [tokens_of(parts) for parts in drawn]
    groups = group_by_prefix(rows, ["s"] * len(rows), capacity)
    assert sorted(index for group in groups for index in group.documents) == list(range(len(rows)))
    for group in groups:
        assert group.tokens == tree_tokens([rows[index] for index in group.documents]) <= capacity


def test_a_group_leaves_room_for_other_sources() -> None:
    """A thousand rows behind one prompt would fill packed sequences of their own, and a step would see nothing else."""
    prompt = np.full(64, 5, dtype=np.int32)
    rows = [np.concatenate([prompt, np.full(32, 10 + n, dtype=np.int32)]) for n in range(100)]
    others = [np.arange(n, n + 200, dtype=np.int32) for n in range(1000, 1300)]
    groups = group_by_prefix(rows + others, ["a"] * 100 + ["b"] * 300, 4096)
    sizes = [group.tokens for group in groups if group.documents[0] < 100]
    assert max(sizes) <= 1024
    assert max(group.tokens for group in group_by_prefix(rows, ["a"] * 100, 4096)) > 3000
    assert sum(sizes) < sum(map(len, rows)) * 0.45


def test_a_long_prompt_is_shared_by_enough_rows() -> None:
    """A quarter of a packed sequence would hold the prompt and little more."""
    prompt = np.full(960, 5, dtype=np.int32)
    rows = [np.concatenate([prompt, np.full(64, 10 + n, dtype=np.int32)]) for n in range(60)]
    groups = group_by_prefix(rows, ["a"] * 60, 4096)
    assert len(groups) <= 2
    assert sum(group.tokens for group in groups) < sum(map(len, rows)) * 0.15
