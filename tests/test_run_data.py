"""A finished run is rendered once more as it was trained: same template, same stops, same ends of texts."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, conversation, write_rows
from tests_support import bare_base

from qlora_sft.config import Config, dump_config
from qlora_sft.errors import RunError
from qlora_sft.export import imatrix
from qlora_sft.export.probe import read_probe
from qlora_sft.prepare import prepare
from qlora_sft.run_data import RunData, saved_text

# Gemma's way to write: the end of a turn is no special token and not the eos token, but generation stops at it.
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def quiet(_: str) -> None:
    pass


def finished(config: Config, data: RunData) -> Path:
    """The folder of a run that began with ``data``, as far as text is concerned."""
    run = Path(config.output)
    data.tokenizer.save_pretrained(run / "adapter")
    (run / "config.yaml").write_text(dump_config(config))
    (run / "manifest.json").write_text(json.dumps({"config": asdict(config), "report": {"base": data.base}}))
    return run


def ids(documents: Any) -> list[list[int]]:
    return [list(document.input_ids) for document in documents]


@pytest.fixture
def like_gemma(tmp_path: Path, tiny_model: Path, short_tokenizer: Any) -> Path:
    """A base whose turns end in a token that only its generation config names."""
    base = tmp_path / "base"
    tokenizer = copy.deepcopy(short_tokenizer)
    tokenizer.add_tokens(["<end_of_turn>"])
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(base)
    settings = json.loads((tiny_model / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "vocab_size": len(tokenizer)}))
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return base


def test_the_importance_matrix_is_of_what_was_trained_where_turns_end_in_a_generation_stop(
    like_gemma: Path, make_config: MakeConfig
) -> None:
    config = make_config(f"model.path={like_gemma}")
    data = prepare(config, quiet, unsloth=False)
    assert data.tokenizer.eos_token != "<end_of_turn>"
    assert imatrix._training_documents(finished(config, data)) == ids(data.documents)


def test_the_importance_matrix_takes_its_share_of_every_source_and_renders_little_more(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_rows(tmp_path / "first.jsonl", [conversation(i) for i in range(3)])
    config = make_config(f"data.train=[{{path: {first}}}, {{path: {tmp_path / 'chat.jsonl'}}}]", rows=[conversation(9)])
    data = prepare(config, quiet, unsloth=False)
    run = finished(config, data)
    a, b, c, other = ids(data.documents)
    assert imatrix._training_documents(run) == [a, other, b, c]
    # A row that cannot be rendered, long after there is enough.
    late = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "r"}]}
    write_rows(first, [*(conversation(i) for i in range(1100)), late])
    monkeypatch.setattr(imatrix, "TOKENS", len(a) + len(other))
    assert imatrix._training_documents(run) == [a, other]
    write_rows(first, [late])
    with pytest.raises(RunError, match=r"cannot be read .*first.jsonl:1.*'reasoning'"):
        imatrix._training_documents(run)


def test_held_out_rows_are_those_of_the_run_though_a_template_brought_its_own_eos(
    tmp_path: Path, small_tokenizer: Any, make_config: MakeConfig
) -> None:
    """A plain text ends in the base's eos token, and the adapter's tokenizer names another one."""
    base = bare_base(tmp_path / "base", small_tokenizer, tied=True, room=8)
    (tmp_path / "text.txt").write_text("A plain text.\n\nAnother one, a little longer.\n")
    held_out = f"data.held_out=[{{path: {tmp_path / 'text.txt'}}}, {{path: {tmp_path / 'chat.jsonl'}}}]"
    config = make_config(f"model.path={base}", "model.chat_template=chatml", held_out)
    data = prepare(config, quiet, unsloth=False)
    run = finished(config, data)
    assert data.tokenizer.eos_token == "<|im_end|>"
    text = saved_text(run)
    assert text.tokenizer.eos_token == "<|im_end|>"
    again = text.render(config, config.data.held_out)
    for source, documents in data.held_out.documents.items():
        assert ids(again.documents[source]) == ids(documents)
        assert [list(d.weights) for d in again.documents[source]] == [list(d.weights) for d in documents]
    assert ids(data.held_out.documents["text"])[0][-1] == small_tokenizer.eos_token_id
    assert text.chat_format == data.chat_format
    assert read_probe(run, text.tokenizer).documents[0] == ids(data.held_out.documents["text"])[0][:-1]
