"""Tokens that a converter has put behind a model's vocabulary are taken out of the file, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_sft.export.gguf_padding import drop_padding, rows_of
from qlora_sft.gguf_file import read_gguf


def write(file: Path, tokens: list[str], rows: int, scores: bool = False) -> None:
    writer = GGUFWriter(str(file), "granitehybrid")
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types([5 if token.startswith("[PAD") else 1 for token in tokens])
    if scores:
        writer.add_token_scores([float(number) for number in range(len(tokens))])
    writer.add_token_merges(["a b"])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    weights = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", weights.normal(size=(rows, 8)).astype(np.float32))
    writer.add_tensor("output_norm.weight", weights.normal(size=8).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=9), st.integers(1, 7), st.booleans())
def test_the_file_is_that_of_a_vocabulary_without_padding(
    tmp_path: Path, tokens: list[str], padding: int, scores: bool
) -> None:
    padded, plain = tmp_path / "padded.gguf", tmp_path / "plain.gguf"
    write(padded, [*tokens, *(f"[PAD{len(tokens) + each}]" for each in range(padding))], len(tokens), scores)
    write(plain, tokens, len(tokens), scores)
    size = padded.stat().st_size
    assert drop_padding(padded) == padding
    assert padded.stat().st_size == size
    (found, tensors), (wanted, expected) = read(padded), read(plain)
    filler = found.keys() - wanted.keys()
    assert len(filler) == 1
    assert {name: found[name] for name in wanted} == wanted
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    assert rows_of(read_gguf(padded)) == len(tokens)
    assert drop_padding(padded) == 0


@pytest.mark.parametrize(("tokens", "rows"), [(["a", "b"], 2), (["a", "b", "c"], 2), (["a", "[PAD1]"], 3)])
def test_a_file_without_padding_stays_as_it_is(tmp_path: Path, tokens: list[str], rows: int) -> None:
    file = tmp_path / "model.gguf"
    write(file, tokens, rows)
    before = file.read_bytes()
    assert drop_padding(file) == 0
    assert file.read_bytes() == before
