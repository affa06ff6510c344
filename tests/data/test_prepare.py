"""The ledger accounts for every row; the plan of a run trains what the mixture says, when it says it."""

import json
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config_data import DataConfig, ReplayConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.dedup import clean_sources
from qlora_sft.data.ledger import ledger_table
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.render import Rendered
from qlora_sft.data.sequences import plan_sequences
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import DataError


def write(path: Path, answers: list[str]) -> SourceConfig:
    path.write_text("".join(json.dumps({"prompt": "q", "completion": answer}) + "\n" for answer in answers))
    return SourceConfig(str(path))


def test_every_row_is_read_kept_or_dropped_for_a_reason_with_its_first_lines(tmp_path: Path, tokenizer: Any) -> None:
    answers = [f"answer {i}" for i in range(20)] + ["answer 3"] * 5 + ["long " * 80] + ["long " * 81, "long " * 82]
    source = write(tmp_path / "a.jsonl", answers)
    data = DataConfig([TrainSourceConfig(source.path)], max_length=64, deduplicate="exact")
    sources, _ = clean_sources(read_sources([source], 0), data)
    ledger = render_sources(sources, data, tokenizer).ledger["a"]
    assert (ledger.read, ledger.not_drawn, ledger.kept) == (28, 0, 20)
    assert {reason: drop.rows for reason, drop in ledger.dropped.items()} == {"duplicate": 5, "too long": 3}
    assert ledger.dropped["duplicate"].first == [f"{source.path}:{line}" for line in (21, 22, 23)]
    text = ledger_table({"a": ledger})
    assert f"5 dropped (duplicate): {source.path}:21, {source.path}:22, {source.path}:23 ..." in text
    drawn = SourceConfig(source.path, max_rows=12)
    ledger = render_sources(read_sources([drawn], 0), data, tokenizer).ledger["a"]
    assert ledger.not_drawn == 16
    assert ledger.read == ledger.not_drawn + ledger.kept + sum(drop.rows for drop in ledger.dropped.values())


def test_percentiles_are_lengths_that_so_many_rows_do_not_exceed(tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "a.jsonl", ["x " * n for n in range(1, 101)])
    data = DataConfig([TrainSourceConfig(source.path)])
    prepared = render_sources(read_sources([source], 0), data, tokenizer)
    lengths = [len(document.input_ids) for document in prepared.all_documents]
    ledger = prepared.ledger["a"]
    for value, share in ((ledger.p50, 50), (ledger.p95, 95), (ledger.p99, 99), (ledger.longest, 100)):
        assert value in lengths
        assert sum(length <= value for length in lengths) >= share > sum(length < value for length in lengths)


def test_the_loss_weight_of_a_source_multiplies_the_weights_of_its_messages(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    data = DataConfig([TrainSourceConfig(str(file))])
    half, triple = (
        render_sources(read_sources([SourceConfig(str(file), loss_weight=w)], 0), data, tokenizer).all_documents[0]
        for w in (1.0, 3.0)
    )
    assert set(half.weights) == {0.0, 0.5}
    assert triple.weights == [3 * weight for weight in half.weights]


def test_all_rows_that_cannot_be_rendered_are_named_at_once(tmp_path: Path, own_tokenizer: Any) -> None:
    """The model's own template has no tools; every such row, of every source, is in one error."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    bad = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sources = []
    for name, rows in (("a", [good, bad, good, bad]), ("b", [good]), ("c", [bad] * 30)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        sources.append(SourceConfig(str(file)))
    data = DataConfig([TrainSourceConfig("a")])
    with pytest.raises(DataError) as caught:
        render_sources(read_sources(sources, 0), data, own_tokenizer)
    lines = str(caught.value).splitlines()
    a, c = tmp_path / "a.jsonl", tmp_path / "c.jsonl"
    assert [line.split(": ")[0] for line in lines] == [f"{a}:2", f"{c}:1"]
    assert all("model.chat_template=chatml-think" in line for line in lines)
    assert lines[0].endswith(f"(the same in 2 rows, the last at {a}:4)")
    assert lines[1].endswith(f"(the same in 30 rows, the last at {c}:30)")


def test_a_template_that_fails_in_its_own_code_names_row_and_cause(tmp_path: Path, own_tokenizer: Any) -> None:
    import copy

    failing = copy.deepcopy(own_tokenizer)
    failing.chat_template = "{% for m in messages %}{{ m.content.index('=') }}{% endfor %}"
    source = write(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template fails on this conversation \(ValueError: sub"):
        render_sources(read_sources([source], 0), DataConfig([TrainSourceConfig("a")]), failing)
    failing.chat_template = "{% for m in %}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template is not valid Jinja \(its line 1"):
        render_sources(read_sources([source], 0), DataConfig([TrainSourceConfig("a")]), failing)


def test_lost_characters_are_in_the_ledger_with_file_and_line(tmp_path: Path, tokenizer: Any) -> None:
    hole = next(
        chr(c) for c in range(0x10000, 0x110000, 0x1000) if chr(c) not in tokenizer.decode(tokenizer(chr(c)).input_ids)
    )
    source = write(tmp_path / "a.jsonl", ["fine", f"not {hole}{hole}", "fine", f"nor {hole}"])
    ledger = render_sources(read_sources([source], 0), DataConfig([TrainSourceConfig("a")]), tokenizer).ledger["a"]
    assert ledger.lost == {hole: 3}
    assert (ledger.lost_in.rows, ledger.lost_in.first) == (2, [f"{source.path}:2", f"{source.path}:4"])
    text = ledger_table({"a": ledger})
    assert (
        f"3 characters are lost, because no token of this vocabulary spells them: (U+{ord(hole):04X}) 3 times" in text
    )
    assert f"in 2 rows: {source.path}:2, {source.path}:4" in text


def test_all_rows_too_long_is_an_error_with_the_cure(tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "a.jsonl", ["long " * 80])
    with pytest.raises(DataError, match=r"all 1 conversations of 'a' are too long; raise data\.max_length \(now 64\)"):
        render_sources(read_sources([source], 0), DataConfig([TrainSourceConfig("a")], max_length=64), tokenizer)


# ------------------------------------------------------------------ the plan of a run


def documents(**counts: int) -> list[Rendered]:
    return [
        Rendered([1] * (3 + i % 5), [0.0, 1.0, 1.0] + [1.0] * (i % 5), name)
        for name, n in counts.items()
        for i in range(n)
    ]


def test_a_repeated_document_is_in_several_bins_and_the_table_says_so() -> None:
    docs = documents(a=10, b=90)
    weights = [TrainSourceConfig("a", weight=1.0), TrainSourceConfig("b", weight=1.0)]
    said: list[str] = []
    sequences = plan_sequences(
        docs, DataConfig(weights, mixture="explicit", max_length=32), epochs=1, seed=0, say=said.append
    ).sequences
    times = Counter(index for each in sequences for index in each)
    assert {times[index] for index in range(10)} == {5}
    assert sum(times.values()) == 100
    assert all(sum(len(docs[i].input_ids) for i in each) <= 32 for each in sequences)
    assert said[0].startswith("mixture (explicit; 1 epochs)")
    assert "5.00x" in said[0]
    assert "100 documents" in said[1]


def test_long_and_short_documents_come_in_turn_though_packing_takes_the_longest_first() -> None:
    docs = [Rendered([1] * n, [1.0] * n, "a") for n in [32] * 20 + [4] * 160]
    sequences = plan_sequences(
        docs, DataConfig([TrainSourceConfig("a")], max_length=32, share_prefixes="off"), epochs=1, seed=0
    ).sequences
    assert len(sequences) == 40
    assert 5 <= sum(len(each) == 1 for each in sequences[:20]) <= 15


def test_a_window_is_trained_before_the_next_begins() -> None:
    docs = documents(a=170)
    data = DataConfig([TrainSourceConfig("a")], max_length=32, packing_window=50, share_prefixes="off")
    sequences = plan_sequences(docs, data, epochs=1, seed=0).sequences
    assert {50, 100, 150, 170} <= set(accumulate(len(each) for each in sequences))
    whole = plan_sequences(docs, replace(data, packing_window=None), epochs=1, seed=0).sequences
    assert len(whole) <= len(sequences) <= len(whole) + 4
    assert sorted(index for each in sequences for index in each) == list(range(170))


def test_a_curriculum_survives_packing() -> None:
    docs = documents(a=1000, general=50)
    data = DataConfig(
        [TrainSourceConfig("a")], max_length=32, replay=ReplayConfig("general", share=0.2), curriculum="progressive"
    )
    sequences = plan_sequences(docs, data, epochs=1, seed=0).sequences
    replayed = [sum(index >= 1000 for index in each) for each in sequences]
    total = [len(each) for each in sequences]
    # 2x - x^2 of the replay has come after a part x of the run.
    for x in (0.25, 0.5, 0.75):
        until = round(len(sequences) * x)
        assert sum(replayed[:until]) / sum(replayed) == pytest.approx(2 * x - x * x, abs=0.06)
    assert sum(replayed) / sum(total) == pytest.approx(0.2, abs=0.001)
