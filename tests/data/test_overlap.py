"""Held-out documents that are trained on are said, whatever their files look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_sft.config_data import DataConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.overlap import shared_documents
from qlora_sft.data.prepare import Prepared, render_sources
from qlora_sft.data.sources import read_sources


def prepared(file: Path, rows: list[dict[str, Any]], tokenizer: Any) -> Prepared:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = read_sources([SourceConfig(str(file), loss_weight=0.5)], 0)
    return render_sources(sources, DataConfig([TrainSourceConfig("a")]), tokenizer)


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"q{number}", "completion": f"a{number}"}


def chat(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]}


def test_the_same_conversation_in_another_form_is_found(tmp_path: Path, tokenizer: Any) -> None:
    train = prepared(tmp_path / "a.jsonl", [pair(n) for n in range(20)], tokenizer)
    other = prepared(tmp_path / "b.jsonl", [pair(n) for n in range(40, 50)], tokenizer)
    held_out = prepared(tmp_path / "held.jsonl", [chat(n) for n in (3, 3, 19, 30, 31)], tokenizer)
    said = shared_documents({**train.documents, **other.documents}, held_out.documents)
    assert said.startswith("held-out data: 3 of 5 documents of held are trained on as well (in a);")
    assert shared_documents(other.documents, held_out.documents) == ""
    assert shared_documents(train.documents, {}) == ""
