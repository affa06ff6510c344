"""Planted data: what is wrong is an error, what often is a warning, and ordinary data is met with silence."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_sft.cli import main
from qlora_sft.config import Config, load_config
from qlora_sft.data.documents import Writer, answer_counts
from qlora_sft.data.judge import Finding, judge, tell_findings
from qlora_sft.data.plan import plan_data
from qlora_sft.data.render import Rendered
from qlora_sft.data.splits import read_data
from qlora_sft.data.template import choose_chat_format
from qlora_sft.errors import DataError

Rows = list[dict[str, Any]]


def quiet(_: str) -> None:
    pass


def row(number: int, asked: int, answered: int, **more: Any) -> dict[str, Any]:
    """A question and an answer of about so many tokens each, unlike those of any other number."""
    messages = [
        {"role": "user", "content": f"{number}" + " why" * asked},
        {"role": "assistant", "content": " ".join([f"{number}", *["so"] * (answered - len(str(number)))])},
    ]
    return {"messages": messages, **more}


def config_of(folder: Path, sources: dict[str, Rows], *overrides: str, model: object = "demo") -> Config:
    named = []
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        named.append(f"{{path: {folder / f'{name}.jsonl'}}}")
    file = folder / "config.yaml"
    file.write_text(
        f"model: {{path: {model}, backend: transformers, dtype: float32, load_in_4bit: false}}\n"
        f"data: {{train: [{', '.join(named)}], max_length: 2048}}\n"
        f"training: {{max_steps: 1}}\nevaluation: {{answers: 0}}\noutput: {folder / 'run'}\n"
    )
    return load_config(file, overrides)


def found(config: Config, tokenizer: Any, *, twice: bool = False) -> list[Finding]:
    """The findings as training makes them; ``twice``: the second time, when the data comes from the cache."""
    said: list[str] = []
    for _ in range(1 + twice):
        sources = read_data(config, quiet)
        said.clear()
        train, _, packed = plan_data(config, sources.train, [], tokenizer, choose_chat_format(tokenizer), said.append)
    assert not twice or (said[0] == "data: unchanged since it was last prepared, taken from the cache")
    return judge(config, sources.train, train, packed)


def kinds(findings: list[Finding]) -> list[tuple[str, str, str | None]]:
    return [(finding.level, finding.kind, finding.source) for finding in findings]


# ------------------------------------------------------------------ share supervised


@pytest.mark.parametrize(
    ("asked", "answered", "level"),
    [(700, 8, "error"), (120, 18, "warning"), (30, 60, None), (5, 60, None), (1, 700, "warning")],
)
def test_the_share_that_is_supervised(tmp_path: Path, tokenizer: Any, asked: int, answered: int, level: str) -> None:
    rows = [row(n, asked, answered) for n in range(20)]
    findings = found(config_of(tmp_path, {"a": rows}), tokenizer)
    assert kinds(findings) == ([(level, "supervised share", "a")] if level else [])
    accepted = found(config_of(tmp_path, {"a": rows}, "data.train.0.allow_share=true"), tokenizer)
    assert accepted == []


def test_the_causes_of_little_supervision_are_named_with_counts(tmp_path: Path, tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "why " * 150, "parameters": {}}}]
    with_tools = [row(n, 3, 20, tools=tools) if n < 15 else row(n, 3, 20) for n in range(20)]
    masked = [row(n, 3, 20) for n in range(20)]
    for each in masked:
        turns = each["messages"]
        long = {"role": "assistant", "content": " so" * 120, "train": False}
        each["messages"] = [turns[0], long, *turns]
    texts = {
        name: found(config_of(tmp_path, {name: rows}), tokenizer)[0].text
        for name, rows in (("tooled", with_tools), ("masked", masked), ("long", [row(n, 120, 18) for n in range(20)]))
    }
    assert "tool schemas (15 of 20 rows have one of 1 lists), " in texts["tooled"]
    assert "masked answers (20 of 40 assistant turns" in texts["masked"]
    assert "long prompts, 9" in texts["long"]
    assert all("(in 20 rows). If it is meant so, set data.train.0.allow_share=true" in text for text in texts.values())


def test_the_causes_of_much_supervision_are_named_with_counts(tmp_path: Path, tokenizer: Any) -> None:
    """A story is trained with a word of warning; a prompt that stands in the answer, or other turns, are pointed at."""
    story = [row(n, 1, 700) for n in range(20)]
    repeated, dialogues = [row(n, 8, 700) for n in range(20)], [row(n, 1, 700) for n in range(20)]
    for question, answer in (each["messages"] for each in repeated[:15]):
        answer["content"] = f"{question['content']}\n{answer['content']}"
    for _, answer in (each["messages"] for each in dialogues[:4]):
        answer["content"] += "\n### Human: And then?\nNothing."
    texts = {}
    for name, rows in (("story", story), ("repeated", repeated), ("dialogues", dialogues)):
        (finding,) = found(config_of(tmp_path, {name: rows}), tokenizer)
        assert finding.level == "warning"
        texts[name] = finding.text.partition("likely because of ")[2]
    assert texts["story"].startswith("short prompts, 5 characters a row beside 2,")
    assert texts["repeated"].startswith("15 of 20 rows have answers that repeat the prompt; short prompts,")
    assert texts["dialogues"].startswith("4 of 20 rows have answers with other turns in them (User: ...)")


def test_what_has_no_masked_prompts_is_not_judged_by_the_share(tmp_path: Path, tokenizer: Any) -> None:
    text = [{"text": f"{n} " + "so why " * 40} for n in range(20)]
    assert found(config_of(tmp_path, {"text": text}), tokenizer) == []
    rows = [row(n, 700, 8) for n in range(20)]
    assert found(config_of(tmp_path, {"all": rows}, "data.train.0.supervise=all"), tokenizer) == []


@pytest.mark.parametrize(("asked", "kind"), [(5, []), (700, [("error", "supervised share", "mixed")])])
def test_plain_texts_beside_conversations_neither_count_nor_hide_anything(
    tmp_path: Path, tokenizer: Any, asked: int, kind: list[object]
) -> None:
    config = config_of(tmp_path, {"mixed": []})
    folder = tmp_path / "mixed"
    folder.mkdir()
    files = {
        "texts": [{"text": f"{n} " + "so why " * 500} for n in range(20)],
        "chats": [row(n, asked, 20) for n in range(9)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (source,) = config.data.train
    config = replace(config, data=replace(config.data, train=[replace(source, path=str(folder))]))
    assert [each for each in kinds(found(config, tokenizer)) if each[1] == "supervised share"] == kind


def test_reasoning_may_be_long_beside_a_short_question(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row(n, 1, 20) for n in range(20)]
    for each in rows:
        each["messages"][1]["reasoning"] = "so" + " so" * 700
    assert found(config_of(tmp_path, {"a": rows}), tokenizer) == []


def test_the_history_of_one_document_per_turn_is_counted_once(tmp_path: Path, tokenizer: Any) -> None:
    """Twenty turns, half of them answers: as documents of one turn each, less than 10% is supervised."""
    rows = [{"messages": [m for turn in range(20) for m in row(100 * n + turn, 12, 40)["messages"]]} for n in range(5)]
    config = config_of(tmp_path, {"a": rows}, "data.train.0.supervise=turns")
    sources = read_data(config, quiet)
    train, _, packed = plan_data(config, sources.train, [], tokenizer, choose_chat_format(tokenizer), quiet)
    assert train.ledger["a"].share < 0.1
    assert judge(config, sources.train, train, packed) == []


def test_only_what_documents_of_a_row_share_is_counted_once(tmp_path: Path, tokenizer: Any) -> None:
    """Without their first turns they begin differently; counted as one, more than all of the row was supervised."""
    rows = [{"messages": [m for turn in range(20) for m in row(100 * n + turn, 12, 40)["messages"]]} for n in range(5)]
    overrides = ("data.train.0.supervise=turns", "data.max_length=200", "data.overlong=truncate_left_turns")
    config = config_of(tmp_path, {"a": rows}, *overrides)
    sources = read_data(config, quiet)
    train, _, packed = plan_data(config, sources.train, [], tokenizer, choose_chat_format(tokenizer), quiet)
    assert 0.2 < train.ledger["a"].share_of_rows < 0.5
    assert judge(config, sources.train, train, packed) == []


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize(("setting", "expected"), [(None, "warning"), (1, None), (2, "dropped")])
def test_answers_of_one_token(tmp_path: Path, tokenizer: Any, setting: int | None, expected: str | None) -> None:
    one = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(9)
    ]
    rows = [*one, *(row(n, 10, 30) for n in range(20))]
    overrides = [f"data.min_answer_tokens={setting}"] if setting else []
    config = config_of(tmp_path, {"a": rows}, *overrides)
    findings = found(config, tokenizer)
    if expected == "warning":
        assert kinds(findings) == [("warning", "short answers", "a")]
        assert "9 of 29 answers have fewer than 4 tokens" in findings[0].text
        return
    assert findings == []
    sources = read_data(config, quiet)
    train, _, _ = plan_data(config, sources.train, sources.train, tokenizer, choose_chat_format(tokenizer), quiet)
    dropped = train.ledger["a"].dropped
    assert [drop.rows for drop in dropped.values()] == ([9] if expected == "dropped" else [])
    assert set(dropped) <= {"no answer of data.min_answer_tokens"}


def test_a_short_answer_beside_a_long_one_is_kept_and_no_answer_left_is_an_error(
    tmp_path: Path, tokenizer: Any
) -> None:
    both = {
        "messages": [
            *row(1, 3, 30)["messages"],
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "no"},
        ]
    }
    config = config_of(tmp_path, {"a": [both, row(2, 3, 30)]}, "data.min_answer_tokens=30")
    sources = read_data(config, quiet)
    train, _, _ = plan_data(config, sources.train, [], tokenizer, choose_chat_format(tokenizer), quiet)
    assert train.ledger["a"].kept == 2
    config = config_of(tmp_path, {"a": [both, row(2, 3, 30)]}, "data.min_answer_tokens=31")
    sources = read_data(config, quiet)
    with pytest.raises(DataError, match=r"no row of 'a' is left: 2 have no answer of data\.min_answer_tokens=31"):
        plan_data(config, sources.train, [], tokenizer, choose_chat_format(tokenizer), quiet)


@pytest.mark.parametrize("overlong", ["truncate", "truncate_left_turns", "drop"])
def test_answers_that_are_cut_never_end(tmp_path: Path, tokenizer: Any, overlong: str) -> None:
    """Cut in the answer it never ends; cut in the question behind an answer, all answers end."""
    answer_cut = {"messages": row(1, 10, 400)["messages"]}
    question_cut = {"messages": [*row(2, 10, 60)["messages"], *row(3, 400, 20)["messages"]]}
    rows = [answer_cut, question_cut, *(row(n, 20, 40) for n in range(10, 20))]
    config = config_of(tmp_path, {"a": rows}, "data.max_length=256", f"data.overlong={overlong}")
    findings = found(config, tokenizer)
    if overlong == "truncate":
        assert kinds(findings) == [("warning", "answers without end", "a")]
        assert f"1 of 12 rows is cut, so the model learns answers that do not end: {tmp_path / 'a.jsonl'}:1." in (
            findings[0].text
        )
    else:
        assert findings == []


# ------------------------------------------------------------------ duplicates and steps


def test_rows_of_two_sources_are_named_from_the_cache_too(tmp_path: Path, tokenizer: Any) -> None:
    first, second = [row(n, 10, 30) for n in range(20)], [row(n, 10, 30) for n in range(15, 40)]
    for twice in (False, True):
        config = config_of(tmp_path, {"a": first, "b": second}, f"seed={7 + twice}")
        findings = found(config, tokenizer, twice=twice)
        assert kinds(findings) == [("warning", "duplicates", "b")]
        assert findings[0].text.startswith("b: 5 of 25 documents are in other sources as well (5 in a)")
    assert found(config_of(tmp_path, {"a": first, "b": second}, "data.deduplicate=exact"), tokenizer) == []


@pytest.mark.parametrize(("long", "cure"), [(600, True), (100, False)])
def test_steps_with_a_tenfold_spread(tmp_path: Path, tokenizer: Any, long: int, cure: bool) -> None:
    rows = [row(n, 20, 30) for n in range(15)] + [row(n, long // 2, long) for n in range(15, 30)]
    findings = found(config_of(tmp_path, {"a": rows}, "data.packing=none"), tokenizer)
    assert kinds(findings) == ([("warning", "steps", None)] if cure else [])
    if cure:
        assert "data.packing=bfd or training.gradient_accumulation=4" in findings[0].text
        packed = found(config_of(tmp_path, {"a": rows}), tokenizer)
        assert packed == []
        accumulated = config_of(tmp_path, {"a": rows}, "data.packing=none", "training.gradient_accumulation=8")
        assert found(accumulated, tokenizer) == []
        # Tokens per step are what the accumulation follows from, and then the cure as well.
        by_tokens = config_of(tmp_path, {"a": rows}, "data.packing=none", "training.tokens_per_step=4000")
        assert found(by_tokens, tokenizer) == []
        (few,) = found(config_of(tmp_path, {"a": rows}, "data.packing=none", "training.tokens_per_step=9"), tokenizer)
        assert "data.packing=bfd or training.tokens_per_step=36" in few.text


def test_a_run_of_few_steps_is_named_with_what_gives_more(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row(n, 20, 40) for n in range(40)]

    def steps(*overrides: str) -> list[Finding]:
        unlimited = replace(config_of(tmp_path, {"a": rows}, *overrides).training, max_steps=None)
        return found(replace(config_of(tmp_path, {"a": rows}, *overrides), training=unlimited), tokenizer)

    (few,) = steps("training.gradient_accumulation=4")
    assert (few.level, few.kind, few.source) == ("warning", "few steps", None)
    assert "1 optimizer step," in few.text
    cures = re.findall(r"(training\.\S+=\d+|data\.max_length=\d+)", few.text)
    assert cures[:2] == ["training.gradient_accumulation=1", "data.max_length=256"]
    # What it proposes gives more steps, and a number of epochs gives enough of them.
    (fewer,) = steps("training.gradient_accumulation=4", cures[1])
    assert int(re.findall(r"(\d+) optimizer steps", fewer.text)[0]) > 1
    assert steps(cures[0], "data.max_length=256") == []
    assert steps("training.gradient_accumulation=4", cures[2]) == []
    assert steps("data.packing=none") == []
    (by_tokens,) = steps("training.tokens_per_step=9000")
    assert "training.tokens_per_step=900 or " in by_tokens.text
    # A number of steps that was asked for is meant; one that the data does not reach is not.
    assert found(config_of(tmp_path, {"a": rows}, "training.max_steps=9"), tokenizer) != []
    assert found(config_of(tmp_path, {"a": rows}, "training.max_steps=1"), tokenizer) == []


# ------------------------------------------------------------------ in every verb


def test_errors_come_together_and_warnings_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding("error", "supervised share", "a", "first"),
        Finding("error", "supervised share", "b", "second"),
        Finding("warning", "steps", None, "third"),
    ]
    said: list[str] = []
    with pytest.raises(DataError, match=r"^first\nsecond$"):
        tell_findings(findings, said.append)
    assert said == ["warning: third"]


def test_preview_and_train_judge_alike(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2% is an error before the model is loaded, and 15% a warning of both verbs; 55% is met with silence."""
    for asked, answered, code in ((700, 8, 2), (120, 18, 0), (30, 60, 0)):
        config_of(tmp_path, {"a": [row(n, asked, answered) for n in range(6)]}, model=tiny_model)
        texts, loud = [], asked > 30
        for verb in ("preview", "train") if loud else ("preview",):
            assert main([verb, str(tmp_path / "config.yaml"), "--json"]) == code
            out, err = capsys.readouterr()
            texts.append([line for line in err.splitlines() if "little is supervised" in line])
            assert len(texts[-1]) == loud
            if verb == "preview" and code == 0:
                assert [finding["level"] for finding in json.loads(out)["findings"]] == ["warning"] * loud
        assert texts[0] == texts[-1]
        assert (tmp_path / "run" / "adapter").exists() == (code == 0)


def test_what_is_counted_does_not_depend_on_the_type_of_the_numbers() -> None:
    """Weights that a factor has made tiny still count as supervised."""
    writer = Writer("a")
    writer.add(Rendered([1] * 4, [0.0, 1e-6, 1e-6, 0.0], "a"))
    documents = writer.finish()
    assert documents.weights.dtype == np.float64
    assert answer_counts(documents, 4) == (1, 1)
