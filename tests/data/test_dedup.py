"""What counts as seen before, what gives an evaluation away, and that both are reported with file and line."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config_data import DataConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.dedup import Removed, clean_sources, evaluation_ngrams, removed_lines
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import DataError

STORY = "The old lighthouse keeper walked down to the harbour every morning before sunrise to count the fishing boats"


def write(path: Path, *pairs: tuple[str, str], **more: Any) -> Path:
    rows = [{"prompt": question, "completion": answer, **more} for question, answer in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def clean(*files: Path, said: list[str] | None = None, **options: Any) -> tuple[dict[str, list[int]], list[Removed]]:
    """Source -> lines that are left, and what was removed."""
    sources = read_sources([SourceConfig(str(file)) for file in files], 0)
    data = DataConfig([TrainSourceConfig(str(file)) for file in files], **options)
    left, removed = clean_sources(sources, data, (said if said is not None else []).append)
    return {source.name: [row["line"] for row in source.rows] for source in left}, removed


def words(number: int, count: int = 60) -> str:
    rng = random.Random(number)
    return " ".join(f"w{rng.randrange(10_000)}" for _ in range(count))


def test_exact_duplicates_within_and_across_sources_keep_the_first(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ("q", "1"), ("q", "2"), ("q ", " 1"), ("Q", "1"))
    b = write(tmp_path / "b.jsonl", ("r", "1"), ("q", "2"))
    said: list[str] = []
    left, removed = clean(a, b, deduplicate="exact", said=said)
    assert left == {"a": [1, 2, 4], "b": [1]}
    assert removed == [Removed("a", f"{a}:3", "duplicate", f"{a}:1"), Removed("b", f"{b}:2", "duplicate", f"{a}:2")]
    assert "2 rows dropped" in said[0]
    assert f"b: 1 ({b}:2 = {a}:2)" in said[0]
    assert [json.loads(line)["matched"] for line in removed_lines(removed).splitlines()] == [f"{a}:1", f"{a}:2"]


def test_who_says_it_and_which_mode_make_a_difference_and_weights_do_not(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    swapped = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    rows = [
        {"messages": turns},
        {"messages": swapped},
        {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [turns[0], {**turns[1], "weight": 0.5}]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert clean(file, deduplicate="exact")[0] == {"a": [1, 2, 3]}


@pytest.mark.parametrize("how", ["exact", "near"])
def test_what_is_masked_makes_a_difference(tmp_path: Path, how: str) -> None:
    """Rows of the same text of which each teaches something else: code that is run or only shown, one turn or another,
    an answer that is wanted or not."""
    asked = {"role": "user", "content": "x"}
    shown = [{"type": "text", "text": "<|python_start|>1 + 1<|python_end|>"}]
    run = [{"type": "python", "text": "1 + 1"}]
    turns = [asked, {"role": "assistant", "content": "y"}, asked, {"role": "assistant", "content": "z"}]
    first, last = ([{**t, "train": False} if i == n else t for i, t in enumerate(turns)] for n in (3, 1))
    rows = [
        {"messages": [asked, {"role": "assistant", "content": shown}]},
        {"messages": [asked, {"role": "assistant", "content": run}]},
        {"messages": first},
        {"messages": last},
        {"messages": turns[:2], "label": False},
        {"messages": turns[:2], "label": True},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    if how == "near":
        pytest.importorskip("datasketch")
    assert clean(file, deduplicate=how)[0] == {"a": [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize("how", ["exact", "near"])
def test_what_sources_say_of_their_rows_makes_a_difference(tmp_path: Path, how: str) -> None:
    """The same file in two modes, or with other turns learned, teaches something else each time."""
    if how == "near":
        pytest.importorskip("datasketch")
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": turns * n}) + "\n" for n in (1, 2)))
    settings: list[dict[str, Any]] = [{}, *({"supervise": s} for s in ("last", "turns", "all"))]
    settings += [{"thinking": mode} for mode in ("on", "off")]
    named = [SourceConfig(str(file), name=str(n), **each) for n, each in enumerate(settings)]
    data = DataConfig([TrainSourceConfig(str(file))], deduplicate=how)  # type: ignore[arg-type]
    wanted = {1: [2], 3: [1, 2], **({4: [1, 2], 5: [1, 2]} if how == "exact" else {})}  # near tells no modes apart
    for number, kept in wanted.items():
        left, _ = clean_sources(read_sources([named[0], named[number]], 0), data)
        assert [row["line"] for row in left[1].rows] == kept, settings[number]
    with pytest.raises(DataError, match="every row of '2' is dropped"):
        clean_sources(read_sources([named[0], named[2]], 0), data)


def test_texts_without_spaces_are_compared_by_their_characters(tmp_path: Path) -> None:
    """A clause in Chinese or Japanese is no word: one character makes no other text, and thirteen make a run."""
    said = "".join(chr(0x4E00 + random.Random(n).randrange(500)) for n in range(200))
    clauses = "\uff0c".join(said[at : at + 10] for at in range(0, 200, 10))
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": said[40:60]}, ensure_ascii=False) + "\n")
    row = write(tmp_path / "a.jsonl", ("q", clauses), ("q", clauses.replace(said[100], "\u5929", 1)), ("q", said[::-1]))
    assert clean(row, decontaminate=[str(exam)])[0] == {"a": [3]}
    pytest.importorskip("datasketch")
    assert clean(row, deduplicate="near")[0] == {"a": [1, 3]}


def test_near_duplicates_differ_in_little_and_short_questions_do_not_count_as_such(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    long = words(0, 100)
    a = write(
        tmp_path / "a.jsonl",
        ("q", long),
        ("q", words(1, 100)),
        ("q", long + " indeed"),
        ("q", " ".join(long.split()[:50])),
    )
    left, removed = clean(a, deduplicate="near")
    assert left == {"a": [1, 2, 4]}
    assert removed == [Removed("a", f"{a}:3", "near duplicate", f"{a}:1")]
    # A long system prompt in common is no likeness.
    b = write(tmp_path / "b.jsonl", ("What is two and two?", "4"), ("Who wrote Faust?", "Goethe"), system=words(2, 200))
    assert clean(b, deduplicate="near")[0] == {"b": [1, 2]}


def test_near_needs_its_library_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    file = write(tmp_path / "a.jsonl", ("q", "1"))
    with pytest.raises(DataError, match=r"pip install 'qlora-sft\[dedup\]'"):
        clean(file, deduplicate="near")


def test_rows_that_share_a_run_of_words_with_an_evaluation_are_dropped(tmp_path: Path) -> None:
    exam = tmp_path / "exam.json"
    exam.write_text(json.dumps([{"task": "short one"}, {"x": {"deep": [STORY]}}]))
    thirteen = STORY.split()[2:15]
    train = write(
        tmp_path / "train.jsonl",
        ("q", words(3)),
        ("q", f"As they say: {' '.join(thirteen).upper()}!"),
        ("q", "So: " + " ".join(thirteen[:12])),
    )
    said: list[str] = []
    left, removed = clean(train, decontaminate=[str(exam)], said=said)
    assert left == {"train": [1, 3]}
    assert removed == [Removed("train", f"{train}:2", "contaminated", f"{exam}:2")]
    assert said[0] == f"decontaminate: {exam}: 2 texts, 1 of them shorter than 13 words and not compared"
    assert clean(train, decontaminate=[str(exam)], decontaminate_words=12)[0] == {"train": [1]}
    assert clean(train, decontaminate=[str(exam)], decontaminate_words=14)[0] == {"train": [1, 2, 3]}


def test_an_evaluation_that_cannot_be_read_and_a_source_with_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        evaluation_ngrams([str(tmp_path / "exam.jsonl")], 13)
    (tmp_path / "exam.jsonl").write_text('{"a": 1}\n{\n')
    with pytest.raises(DataError, match=r"exam\.jsonl:2: not valid JSON"):
        evaluation_ngrams([str(tmp_path / "exam.jsonl")], 13)
    first, copy = (write(tmp_path / f"{name}.jsonl", ("q", "1")) for name in "ab")
    with pytest.raises(DataError) as caught:
        clean(first, copy, deduplicate="exact")
    assert (
        f"every row of 'b' is dropped (duplicate); remove the source, or what it repeats ({copy}:1 = {first}:1)"
        in str(caught.value)
    )
