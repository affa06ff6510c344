"""Real data files, where they are at hand (QLORA_SFT_DATA, default ../shared/data): recognised, converted, rendered."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from tests_support import real_data

from qlora_sft.config_data import DataConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.sources import Source, read_sources

# File, options, what is printed, rows.
FILES: list[tuple[str, dict[str, Any], str, int]] = [
    ("gsm8k_train.jsonl", {}, "detected prompt_completion (prompt: question, completion: answer)", 7473),
    (
        "HumanEval.jsonl",
        {"columns": {"prompt": "prompt", "completion": "canonical_solution"}},
        "detected prompt_completion (prompt: prompt, completion: canonical_solution)",
        164,
    ),
    ("alpaca_en_demo.json", {}, "detected alpaca (user: instruction + input, assistant: output)", 999),
    ("identity.json", {}, "detected alpaca (user: instruction + input, assistant: output)", 91),
    ("glaive_toolcall_en_demo.json", {}, "detected sharegpt (conversations: from/value)", 300),
    ("reason_tool_use_demo_50.jsonl", {}, "detected messages (messages: role/content)", 50),
    ("wiki_demo.txt", {}, "detected text (text: every token supervised), documents separated by lines", 30),
]


def read(name: str, **options: Any) -> tuple[Source, list[str]]:
    said: list[str] = []
    (source,) = read_sources([SourceConfig(str(real_data(name)), **options)], 0, said.append)
    return source, said


@pytest.mark.parametrize(("name", "options", "printed", "rows"), FILES, ids=[file for file, *_ in FILES])
def test_real_files_are_recognised_and_every_row_is_read(name: str, options: Any, printed: str, rows: int) -> None:
    source, said = read(name, **options)
    assert said[0] == f"{Path(name).stem}: {printed} in {real_data(name)}"
    assert len(list(source.rows)) == source.read == rows
    # HumanEval has tests beside its answers, and says so; of the others everything is used.
    assert [line.split(" (")[0] for line in said[1:]] == (
        ["HumanEval: not used: column 'entry_point'"] if name == "HumanEval.jsonl" else []
    )


@pytest.mark.parametrize(("name", "options"), [file[:2] for file in FILES], ids=[file for file, *_ in FILES])
def test_real_files_are_rendered_with_their_answers_supervised(name: str, options: Any, tokenizer: Any) -> None:
    source, _ = read(name, **options, max_rows=20)
    data = DataConfig([TrainSourceConfig(name)], max_length=40_000)
    prepared = render_sources([source], data, tokenizer)
    for row, document in zip(source.rows, prepared.documents[source.name], strict=True):
        pairs = zip(document.input_ids, document.weights, strict=True)
        trained = tokenizer.decode([token for token, weight in pairs if weight])
        if "text" in row:
            assert row["text"] in tokenizer.decode(document.input_ids)
            assert document.weights == [0.0, *[1.0] * (len(document.input_ids) - 1)]
            continue
        for message in row["messages"]:
            if message["role"] == "assistant":
                assert message["content"] in trained
                assert message.get("reasoning", "") in trained
                for call in message.get("tool_calls", []):
                    assert json.dumps(call["function"]["arguments"], ensure_ascii=False) in trained


def test_the_texts_of_the_tool_sets_arrive_whole() -> None:
    """Against the raw files, without this package's reading of them."""
    source, _ = read("glaive_toolcall_en_demo.json")
    raw = json.loads(real_data("glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    for row, before in zip(source.rows, raw, strict=True):
        said = [t["value"] for t in before["conversations"] if t["from"] in ("human", "gpt", "observation")]
        assert [m["content"] for m in row["messages"] if m["content"]] == said
        wanted = [json.loads(t["value"]) for t in before["conversations"] if t["from"] == "function_call"]
        calls = [c["function"] for m in row["messages"] for c in m.get("tool_calls", [])]
        assert [call["arguments"] for call in calls] == [
            w["arguments"] for part in wanted for w in (part if isinstance(part, list) else [part])
        ]
        assert [tool["function"] for tool in row.get("tools", [])] == json.loads(before["tools"] or "[]")
    source, _ = read("reason_tool_use_demo_50.jsonl")
    lines = real_data("reason_tool_use_demo_50.jsonl").read_text(encoding="utf-8").splitlines()
    for row, line in zip(source.rows, lines, strict=True):
        parts = [part for message in json.loads(line)["messages"] for part in message["content"]]
        for kind, key in (("reasoning", "reasoning"), ("text", "content")):
            assert [m[key] for m in row["messages"] if m.get(key)] == [p["value"] for p in parts if p["type"] == kind]


@pytest.mark.parametrize(("name", "options"), [file[:2] for file in FILES], ids=[file for file, *_ in FILES])
def test_what_preview_counts_is_what_is_trained(
    name: str, options: Any, make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row is in the ledger; its tokens are those of the documents shown, of the manifest and of the run."""
    from qlora_sft.cli import main
    from qlora_sft.train import train

    columns = "".join(f", columns: {{prompt: {c['prompt']}, completion: {c['completion']}}}" for c in options.values())
    rows = 2 if name.endswith(".txt") else 12
    overrides = [
        f"data.train=[{{path: {real_data(name)}, max_rows: {rows}{columns}}}]",
        "data.max_length=1500",
        "model.chat_template=chatml-think",
    ]
    config = make_config(*overrides)
    page = tmp_path / "page.html"
    command = ["preview", str(tmp_path / "config.yaml"), *overrides, "--count", "1000", "--json", "--html", str(page)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    (ledger,) = shown["ledger"].values()
    dropped = sum(drop["rows"] for drop in ledger["dropped"].values())
    assert ledger["read"] == ledger["not_drawn"] + dropped + ledger["kept"]
    assert ledger["not_drawn"] == ledger["read"] - rows
    assert sum(len(row["ids"]) for row in shown["rows"]) == ledger["tokens"]
    assert sum(map(sum, (row["supervised"] for row in shown["rows"]))) == ledger["supervised"] > 0
    line = next(line for line in err.splitlines() if line.startswith(Path(name).stem) and "%)" in line)
    assert f"{ledger['supervised']:,}" in line
    assert html.escape(line) in page.read_text()
    report = train(config, say=lambda _: None)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kept = manifest["data"][Path(name).stem]
    assert {key: kept[key] for key in ledger} == ledger
    assert report.tokens == ledger["tokens"]
    # Nothing predicts the first token of a document, so where that is supervised it is no target.
    assert report.supervised_tokens == ledger["supervised"]
    assert not any(row["supervised"][0] for row in shown["rows"])
