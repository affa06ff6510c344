"""What is kept in files is what was written, and is counted alike wherever a part of it that is read at once ends."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from qlora_sft.data import documents as module
from qlora_sft.data.documents import Chain, Sizes, Writer, answer_counts, sizes
from qlora_sft.data.render import Rendered

WEIGHTS = st.lists(st.sampled_from([0.0, 1.0, 0.25]), max_size=6)
SOURCES = st.lists(st.lists(WEIGHTS, max_size=7), max_size=3)


def rendered(weights: list[list[float]], source: str) -> list[Rendered]:
    return [Rendered([number] * len(each), each, source) for number, each in enumerate(weights)]


@given(SOURCES, st.integers(1, 4))
def test_documents_in_files_are_those_that_were_written(sources: list[list[list[float]]], at_once: int) -> None:
    written, parts = [], []
    for number, weights in enumerate(sources):
        writer = Writer(f"source {number}")
        for document in rendered(weights, f"source {number}"):
            writer.add(document)
            written.append(document)
        parts.append(writer.finish())
    chain = Chain(parts)
    assert [chain[i] for i in range(len(chain))] == list(chain) == written
    with patch.object(module, "_AT_ONCE", at_once):
        assert sizes(chain) == Sizes(
            source=[each.source for each in written],
            tokens=[len(each.weights) for each in written],
            supervised=[sum(weight > 0 for weight in each.weights) for each in written],
            weight=[sum(each.weights) for each in written],
        )
        for part, weights in zip(parts, sources, strict=True):
            text = " ".join("".join("x" if weight else "." for weight in each) for each in weights)
            answers = [len(answer) for answer in text.replace(".", " ").split()]
            assert answer_counts(part, 3) == (len(answers), sum(length - 1 < 3 for length in answers))
