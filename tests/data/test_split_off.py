"""What is held out of training rows: by content, at least one, never trained, near duplicates on one side."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_sft.config import Config, load_config
from qlora_sft.data.near import PERMUTATIONS, families, similarity, sketch
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.sources import Source
from qlora_sft.data.splits import RunSources, read_data, read_held_out, read_trained
from qlora_sft.errors import ConfigError, DataError

WORDS = [f"word{n}" for n in range(400)]


def quiet(_: str) -> None:
    pass


def text(number: int, length: int = 200) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=length))


def row(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": text(number)}]}


def altered(number: int, times: int) -> dict[str, Any]:
    """The row of that number with one word in its middle replaced."""
    words = text(number).split()
    words[100] = f"other{times}"
    return {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": " ".join(words)}]}


def config_of(folder: Path, sources: dict[str, list[dict[str, Any]]], *overrides: str) -> Config:
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    named = ", ".join(f"{{path: {folder / name}.jsonl}}" for name in sources)
    (folder / "c.yaml").write_text(f"model: {{path: demo}}\ndata: {{train: [{named}]}}\noutput: {folder / 'run'}\n")
    return load_config(folder / "c.yaml", overrides)


def split(config: Config, said: list[str] | None = None) -> RunSources:
    return read_data(config, quiet if said is None else said.append)


def answers(source: Source) -> list[str]:
    return [each["messages"][1]["content"] for each in source.rows]


def test_a_share_of_every_source_is_held_out_and_the_rest_is_trained(tmp_path: Path) -> None:
    rows = {"a": [row(n) for n in range(100)], "b": [row(n) for n in range(100, 140)], "c": [row(999), row(1000)]}
    said: list[str] = []
    sources = split(config_of(tmp_path, rows, "data.held_out=10%"), said)
    assert [(source.name, len(source.rows)) for source in sources.held_out] == [("a", 10), ("b", 4), ("c", 1)]
    for before, train, held_out in zip(rows.values(), sources.train, sources.held_out, strict=True):
        everything = [each["messages"][1]["content"] for each in before]
        assert sorted(answers(train) + answers(held_out)) == sorted(everything)
        assert [a for a in everything if a in set(answers(train))] == answers(train)
        assert train.removed["held out"] == [f"{train.path}:{everything.index(a) + 1}" for a in answers(held_out)]
    assert "a: 10 of 100 rows are held out, chosen by seed and content, near duplicates (similarity from 0.8 on)" in (
        " ".join(said)
    )


def test_the_choice_follows_content_and_seed_and_not_the_order_of_rows_or_names(tmp_path: Path) -> None:
    rows = [row(n) for n in range(60)]
    shuffled = random.Random(1).sample(rows, 60)
    first, second, other = (
        set(answers(split(config_of(tmp_path, sources, "data.held_out=20%", f"seed={seed}")).held_out[0]))
        for sources, seed in (({"a": rows}, 0), ({"renamed": shuffled}, 0), ({"a": rows}, 1))
    )
    assert first == second
    assert first != other


@given(st.lists(st.integers(1, 6), min_size=3, max_size=12), st.integers(0, 3), st.sampled_from(["5%", "20%", "50%"]))
@settings(max_examples=15, deadline=None)
def test_near_duplicates_are_on_one_side_in_all_sources(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int, share: str
) -> None:
    """Families of rows that differ in one word, spread over two sources."""
    every = [(family, altered(family, times)) for family, size in enumerate(sizes) for times in range(size)]
    random.Random(seed).shuffle(every)
    half = len(every) // 2 or 1
    rows = {"a": [each for _, each in every[:half]], "b": [each for _, each in every[half:]] or [row(999)]}
    rows = {name: [*given, row(500 + len(name) + ord(name)), row(700 + ord(name))] for name, given in rows.items()}
    config = config_of(tmp_path_factory.mktemp("split"), rows, f"data.held_out={share}", f"seed={seed}")
    sources = split(config)

    def family(words: str) -> frozenset[str]:
        return frozenset(word for word in words.split() if not word.startswith("other"))

    trained = {family(a) for source in sources.train for a in answers(source)}
    held_out = {family(a) for source in sources.held_out for a in answers(source)}
    assert not trained & held_out
    assert all(len(source.rows) >= 1 for source in [*sources.train, *sources.held_out])
    assert [len(t.rows) + len(h.rows) for t, h in zip(sources.train, sources.held_out, strict=True)] == [
        len(given) for given in rows.values()
    ]


def test_near_duplicates_without_spaces_are_on_one_side(tmp_path: Path) -> None:
    """Chinese answers of which one character is another; ten of each of six."""

    def answer(family: int, times: int) -> dict[str, Any]:
        characters = [chr(0x4E00 + c) for c in random.Random(family).choices(range(2000), k=120)]
        characters[60] = chr(0x7000 + times)
        clauses = "\u3002".join("".join(characters[at : at + 12]) for at in range(0, 120, 12))
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": clauses}]}

    rows = [answer(family, times) for family in range(6) for times in range(10)]
    sources = split(config_of(tmp_path, {"a": rows}, "data.held_out=20%"))
    begins = [{each[:12] for each in answers(part)} for part in (sources.train[0], sources.held_out[0])]
    assert not begins[0] & begins[1]
    assert len(sources.held_out[0].rows) == 10


def test_rows_of_one_conversation_are_on_one_side(tmp_path: Path) -> None:
    """Logs have a row per answer, with all that was said before: what one row is asked, the next one has learned."""

    def turns(number: int, count: int) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": f"today is {count}"}]
        for turn in range(count):
            messages.append({"role": "user", "content": f"{number} {turn}?"})
            last = {"reasoning": text(10_000 + 10 * number + count)} if turn == count - 1 else {}
            messages.append({"role": "assistant", "content": text(100 * number + turn, 40), **last})
        return {"messages": messages}

    def numbers(source: Source) -> set[str]:
        return {each["messages"][1]["content"].split()[0] for each in source.rows}

    rows = [turns(number, count) for number in range(20) for count in (1, 2, 3)]
    random.Random(0).shuffle(rows)
    sources = split(config_of(tmp_path, {"a": rows[:30], "b": rows[30:]}, "data.held_out=20%"))
    trained, held_out = (set.union(*map(numbers, part)) for part in (sources.train, sources.held_out))
    assert held_out
    assert not trained & held_out
    # Beginning alike is not going on: two answers to one question, or a greeting in common.
    greeting = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    alone = [[*greeting, *row(n)["messages"]] for n in range(20)]
    (held,) = split(config_of(tmp_path, {"c": [{"messages": each} for each in alone]}, "data.held_out=20%")).held_out
    assert len(held.rows) == 4


def test_a_source_without_a_share_keeps_its_rows_and_what_is_like_them_is_not_held_out(tmp_path: Path) -> None:
    rows = {"a": [row(n) for n in range(20)], "b": [altered(n, 1) for n in range(18)]}
    sources = split(config_of(tmp_path, rows, "data.train.0.held_out=10%"))
    assert [(source.name, len(source.rows)) for source in sources.held_out] == [("a", 2)]
    assert len(sources.train[1].rows) == 18
    assert set(answers(sources.held_out[0])) == {text(18), text(19)}
    of_all = split(config_of(tmp_path, rows, "data.held_out=10%", "data.train.1.held_out=0%"))
    assert answers(of_all.held_out[0]) == answers(sources.held_out[0])


def test_a_source_of_one_pattern_is_an_error_with_its_cure(tmp_path: Path) -> None:
    rows = {"a": [altered(1, n) for n in range(20)], "b": [row(n) for n in range(20)]}
    with pytest.raises(DataError, match=r"no row of 'a' can be held out, because its 20 rows are near duplicates"):
        split(config_of(tmp_path, rows, "data.held_out=10%"))


def test_answers_that_are_not_wanted_are_not_held_out(tmp_path: Path) -> None:
    """They are not measured, so that a small source would have nothing held out."""
    rows = {"a": [row(n) if n % 10 == 0 else {**row(n), "label": False} for n in range(40)]}
    for seed in range(4):
        (held_out,) = split(config_of(tmp_path, rows, "data.held_out=25%", f"seed={seed}")).held_out
        assert set(answers(held_out)) <= {text(n) for n in (0, 10, 20, 30)}
        assert len(held_out.rows) == 1
    one = {"a": rows["a"][1:11]}
    with pytest.raises(DataError, match=r"no row of 'a' can be held out, because it has only one row; .*held_out: 0%"):
        split(config_of(tmp_path, one, "data.held_out=25%"))
    # Which is for the renderer to say: nothing of it can be trained.
    assert split(config_of(tmp_path, {"a": rows["a"][1:9]}, "data.held_out=25%")).held_out == []


def test_a_row_that_is_held_out_and_too_long_is_an_error_that_says_so(tmp_path: Path, tokenizer: Any) -> None:
    long = row(2)
    long["messages"][1]["content"] += " so" * 900
    for seed in range(20):
        config = config_of(tmp_path, {"a": [row(1), long]}, "data.held_out=5%", "data.max_length=1500", f"seed={seed}")
        (held_out,) = split(config).held_out
        if answers(held_out)[0].endswith(" so"):
            break
    with pytest.raises(
        DataError, match=r"the 1 rows that were held out of 'a' cannot be measured \(too long: "
    ) as told:
        render_sources([held_out], config.data, tokenizer)
    assert "hold out a larger share, take another seed, or set held_out: 0%" in str(told.value)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.held_out=60%", "data.held_out must be a share of at most half, as 5%, got '60%'; or list sources"),
        ("data.held_out=some", "data.held_out must be a share of at most half, as 5%, got 'some'; or list sources"),
        ("data.held_out=0.05", "data.held_out must be a list or a text, got 0.05"),
        ("data.train.0.held_out=x%", "data.train.0.held_out must be a share of at most half, as 5%, got 'x%'"),
    ],
)
def test_a_share_that_is_none_is_refused(tmp_path: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, {"a": [row(1)]}, override)
    assert any(each.endswith(problem) for each in caught.value.problems)


def test_a_named_held_out_source_may_not_have_the_name_of_one_that_is_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.held_out has two sources named a;"):
        config_of(
            tmp_path, {"a": [row(1)]}, "data.train.0.held_out=5%", f"data.held_out=[{{path: {tmp_path}/a.jsonl}}]"
        )


def test_what_is_read_again_later_is_what_the_run_had(tmp_path: Path) -> None:
    """Export compares on held-out rows and calibrates on trained ones, read anew by the configuration."""
    rows = {"a": [row(n) for n in range(30)], "b": [row(n) for n in range(50, 70)]}
    config = config_of(tmp_path, rows, "data.held_out=20%", "data.deduplicate=exact")
    sources = split(config)
    assert list(map(answers, read_held_out(config))) == list(map(answers, sources.held_out))
    assert list(map(answers, read_trained(config))) == list(map(answers, sources.train))


@pytest.mark.parametrize(
    ("more", "now", "count"),
    [(0, "data.held_out=10%", 0), (60, "data.held_out=10%", 4), (0, "seed=1", 5), (0, "data.held_out=20%", 6)],
)
def test_held_out_rows_that_the_adapter_was_trained_on_are_counted(
    tmp_path: Path, more: int, now: str, count: int
) -> None:
    """An exact share of more rows, or of the same with another seed, takes other rows."""
    rows = [row(n) for n in range(7000, 7060)]
    began = config_of(tmp_path, {"a": rows}, "data.held_out=10%")
    earlier = tmp_path / "earlier"
    (earlier / "adapter").mkdir(parents=True)
    (earlier / "config.yaml").write_text((tmp_path / "c.yaml").read_text().replace("data: {", "data: {held_out: 10%, "))
    trained = set(answers(split(began).train[0]))
    (tmp_path / "more").mkdir()
    grown = {"a": [*rows, *(row(n) for n in range(7500, 7500 + more))]}
    for place in (earlier, earlier / "adapter"):
        config = config_of(tmp_path / "more", grown, "data.held_out=10%", now)
        config = replace(config, lora=replace(config.lora, from_=str(place)))
        said: list[str] = []
        held_out = answers(split(config, said).held_out[0])
        assert sum(each in trained for each in held_out) == count
        warned = [each for each in said if "were trained on by" in each]
        assert [each.split(" rows")[0] for each in warned] == (
            [f"warning: held-out data: {count} of {len(held_out)}"] if count else []
        )
    (tmp_path / "a.jsonl").unlink()
    split(config, said)
    assert "cannot be read again" in said[-1]


# ------------------------------------------------------------------ similarity


def jaccard(a: list[str], b: list[str], shingle: int) -> float:
    x, y = ({tuple(words[i : i + shingle]) for i in range(len(words) - shingle + 1)} for words in (a, b))
    return len(x & y) / len(x | y)


@given(st.integers(0, 50), st.integers(0, 120), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_the_share_of_equal_minima_estimates_the_similarity(kept: int, added: int, seed: int) -> None:
    a = text(seed, 120).split()
    b = a[kept:] + text(seed + 1, 120).split()[:added]
    # Three standard deviations of a share of 128 trials, and a bit.
    assert abs(similarity(sketch(a, 5), sketch(b, 5)) - jaccard(a, b, 5)) <= 0.17


def test_families_are_chains_of_what_is_alike() -> None:
    words = text(1, 200).split()
    chain = [words[n : n + 150] for n in (0, 10, 20, 30, 40)]
    alone = [text(n, 150).split() for n in (2, 3)]
    sketches = np.stack([sketch(each, 5) for each in [*chain, *alone, []]])
    assert similarity(sketches[0], sketches[4]) < 0.8
    assert families(sketches, 0.8) == [0, 0, 0, 0, 0, 5, 6, 7]
    assert sketches.shape[1] == PERMUTATIONS
    assert families(sketches[::-1].copy(), 0.8) == [0, 1, 2, 3, 3, 3, 3, 3]


def test_a_bucket_of_very_many_is_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_sft.data.near._COMPARED", 3)
    base = sketch(text(1).split(), 5)
    half = np.stack([np.where(np.arange(PERMUTATIONS) < 64, base, sketch([f"x{n}"], 5)) for n in range(5)])
    assert families(half[:3], 0.8) == [0, 1, 2]
    assert families(half, 0.8) == [0] * 5


def test_the_sketch_of_a_text_is_the_same_on_every_machine() -> None:
    """Which rows are held out must not change between machines or versions; the numbers were computed once."""
    found = sketch("the same words give the same sketch".split(), 5)
    assert found.dtype == np.uint32
    assert found[:3].tolist() == [3116404747, 1395220731, 843443648]
