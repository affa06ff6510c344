"""The GGUF of a hybrid or a mixture is the model that was merged: rearranged by the converter, run by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import every_gguf
import numpy as np
import pytest
import torch
from every_gguf import tokenizer_of, try_gguf, write_run
from safetensors.torch import load_file, save_file

from qlora_sft.export.gguf import export_run
from qlora_sft.export.gguf_arrangements import arrangements
from qlora_sft.export.merge import merge_run
from qlora_sft.export.stale import is_stale
from qlora_sft.run.folder import Run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
HYBRIDS = ("falcon_h1", "gemma4_text", "granitemoehybrid", "lfm2", "llama4_text", "qwen3_5_text", "qwen3_next")
MIXTURES = ("deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_moe")
# Of these that also see, the language model.
SEE = ("gemma3", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*HYBRIDS, *MIXTURES, *SEE])
def test_a_gguf_is_the_merged_model(kind: str, tmp_path: Path) -> None:
    tried = try_gguf(kind, tmp_path)
    assert tried.reason == ""
    assert tried.kl is not None
    assert tried.kl < 2e-4


@pytest.mark.slow
def test_a_vocabulary_that_is_no_multiple_of_8_and_layers_without_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter fills the vocabulary up, and takes every Nemotron-H of transformers for a mixture."""
    dense = {"layer_types": ["linear_attention", "mlp", "full_attention", "mlp"]}
    monkeypatch.setitem(every_gguf.OWN, "nemotron_h", dense)
    monkeypatch.setattr(every_gguf, "tokenizer_of", lambda kind: with_one_more(tokenizer_of(kind)))
    for kind in ("granitemoehybrid", "nemotron_h"):
        (tmp_path / kind).mkdir()
        tried = try_gguf(kind, tmp_path / kind)
        assert tried.reason == ""
        assert tried.kl is not None
        assert tried.kl < 2e-4


def with_one_more(tokenizer: Any) -> Any:
    tokenizer.add_tokens(["<one more>"])
    assert len(tokenizer) % 8
    return tokenizer


def test_a_merged_model_of_another_adapter_is_made_again(tmp_path: Path) -> None:
    """The file of a run is that of the adapter it has now, whatever was merged before."""
    run = write_run("llama", tmp_path)
    merge_run(run, say=lambda _: None)
    assert not is_stale(Run.open(run))
    weights, merged = run / "adapter" / "adapter_model.safetensors", run / "merged" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert is_stale(Run.open(run))
    before, said = load_file(merged), list[str]()
    export_run(run, "f16", say=said.append)
    assert any("another adapter" in line for line in said)
    assert not is_stale(Run.open(run))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(load_file(merged)[name], before[name])


def test_the_rows_of_the_table_were_measured() -> None:
    file = Path(__file__).parents[2] / "docs" / "families_gguf.jsonl"
    rows = {row["kind"]: row for row in map(json.loads, file.read_text().splitlines())}
    for kind in (*HYBRIDS, *MIXTURES, *SEE):
        assert rows[kind]["kl"] is not None, rows[kind]
        assert rows[kind]["kl"] < 1e-3


def test_the_value_heads_of_a_delta_net_go_around_its_key_heads() -> None:
    config = {
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 4, "linear_value_head_dim": 5,
    }  # fmt: skip
    heads = np.repeat(np.arange(6), 5)[:, None] * np.ones((1, 3))
    around = np.repeat([0, 3, 1, 4, 2, 5], 5)[:, None] * np.ones((1, 3))
    qk = np.full((16, 3), 9.0)
    for name, weight, expected in (
        ("in_proj_z.weight", heads, around),
        ("out_proj.weight", heads.T, around.T),
        ("in_proj_qkv.weight", np.concatenate([qk, heads]), np.concatenate([qk, around])),
        ("dt_bias", np.arange(6.0), np.array([0.0, 3, 1, 4, 2, 5])),
    ):
        found = list(arrangements(f"model.layers.0.linear_attn.{name}", weight, config))
        assert any(np.array_equal(form, expected) for form in found), name
        assert not any(np.array_equal(form, expected) for form in arrangements(f"model.x.{name}", weight, config))
    logarithm = np.log(np.arange(1.0, 7.0))
    found = list(arrangements("model.layers.0.linear_attn.A_log", logarithm, config))
    assert any(np.allclose(form, [-1, -4, -2, -5, -3, -6]) for form in found)


def test_what_the_converter_computes_in_float16_is_known() -> None:
    """It makes 1 + w of a norm, and the decay of a state of its logarithm, in the type of the merged model."""
    half = np.random.default_rng(0).normal(size=64).astype(np.float16)
    for name, made in (("input_layernorm.weight", half + np.float16(1)), ("mamba.A_log", -np.exp(half))):
        found = list(arrangements(f"model.layers.0.{name}", half.astype(np.float32), {}))
        assert any(np.array_equal(form, made.astype(np.float32)) for form in found), name
        assert not np.array_equal(found[1], made.astype(np.float32))
