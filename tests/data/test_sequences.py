"""Packed sequences whose documents share prefixes: when they are made, and what they do to the mixture."""

from __future__ import annotations

from random import Random

import pytest

from qlora_sft.config_data import DataConfig, TrainSourceConfig
from qlora_sft.data.render import Rendered
from qlora_sft.data.sequences import Sharing, plan_sequences

SOURCES = "abcde"


def five_sources(rows: int = 80) -> list[Rendered]:
    """Every source has a prompt of its own before each of its rows; that of the first is long."""
    drawn = Random(0)
    documents = []
    for number, name in enumerate(SOURCES):
        prompt = [1000 * (number + 1) + i for i in range(400 if number == 0 else 48)]
        for _ in range(rows):
            answer = [drawn.randrange(20_000, 30_000) for _ in range(drawn.randrange(20, 120))]
            documents.append(Rendered(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer), name))
    return documents


def data(**more: object) -> DataConfig:
    return DataConfig([TrainSourceConfig(name) for name in SOURCES], max_length=2048, **more)  # type: ignore[arg-type]


def test_rows_that_share_much_are_computed_once_and_every_row_comes_once() -> None:
    documents, said = five_sources(), list[str]()
    packed = plan_sequences(documents, data(), 1, 0, said.append)
    assert packed.shares_prefixes
    assert max(packed.tokens) <= 2048
    assert sorted(index for each in packed.sequences for index in each) == list(range(len(documents)))
    rows = sum(len(document.input_ids) for document in documents)
    assert rows / sum(packed.tokens) > 1.8
    assert f"prefixes: {rows:,} tokens in rows, {sum(packed.tokens):,} computed" in said[1]
    assert packed == plan_sequences(documents, data(), 1, 0)


def test_the_mixture_of_a_step_stays_that_of_the_run() -> None:
    """A packed sequence has documents of at least two sources, and eight of them have about the share of each."""
    documents = five_sources()
    shared, alone = (plan_sequences(documents, data(share_prefixes=how), 1, 0) for how in ("auto", "off"))
    for packed in (shared, alone):
        steps = [packed.sequences[i : i + 8] for i in range(0, len(packed.sequences) - 7, 8)]
        for step in steps:
            indices = [index for each in step for index in each]
            shares = [sum(documents[i].source == name for i in indices) / len(indices) for name in SOURCES]
            assert max(abs(share - 0.2) for share in shares) < 0.2
    several = [len({documents[i].source for i in each}) for each in shared.sequences]
    assert sum(count > 1 for count in several) > 0.8 * len(several)


@pytest.mark.parametrize(("how", "cannot"), [("off", None), ("auto", "the model has layers of another kind")])
def test_it_is_left_alone_where_it_is_off_or_cannot_be(how: str, cannot: str | None) -> None:
    documents, said = five_sources(20), list[str]()
    packed = plan_sequences(documents, data(share_prefixes=how), 1, 0, said.append, Sharing(cannot))
    assert not packed.shares_prefixes
    assert packed.tokens == [sum(len(documents[i].input_ids) for i in each) for each in packed.sequences]
    assert any("the model has layers of another kind" in text for text in said) == (cannot is not None)


def test_where_it_costs_more_it_has_to_save_more() -> None:
    documents, said = five_sources(20), list[str]()
    assert not plan_sequences(documents, data(), 1, 0, said.append, Sharing(worth=0.99)).shares_prefixes
    assert not any("prefixes" in text for text in said)
    assert plan_sequences(
        documents, data(), 1, 0, said.append, Sharing(worth=0.15, reason="tried here")
    ).shares_prefixes
    assert "(data.share_prefixes=auto: tried here)" in "".join(said)


def test_rows_that_share_nothing_are_packed_as_before() -> None:
    drawn = Random(1)
    documents = [Rendered([drawn.randrange(1000) for _ in range(90)], [1.0] * 90, "a") for _ in range(40)]
    shared, alone = (plan_sequences(documents, data(share_prefixes=how), 2, 0) for how in ("auto", "off"))
    assert shared == alone
