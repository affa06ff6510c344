"""A merge of experts finds its tensors in files that name or hold them otherwise than transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from every_gguf import write_run
from safetensors.torch import load_file, save_file
from tests_support import keep_code_in
from transformers import AutoModelForCausalLM

from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import check_parity

CODE = {
    "configuration_own.py": "from transformers import Qwen3MoeConfig\n\n\nclass OwnConfig(Qwen3MoeConfig):\n"
    "    model_type = 'own_moe'\n",
    "modeling_own.py": "from transformers import Qwen3MoeForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnForCausalLM(Qwen3MoeForCausalLM):\n    config_class = OwnConfig\n",
}
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def edited(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def check_merge(run: Path, names: set[str]) -> None:
    written = merge_run(run, say=lambda _: None)
    assert check_parity(run, Path(written.merged), say=lambda _: None)["merged"].kl < 1e-6
    assert set(load_file(run / "merged" / "model.safetensors")) == names


def test_files_of_a_base_that_leave_the_prefix_out(tmp_path: Path) -> None:
    run = write_run("qwen3_moe", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    assert "layers.0.mlp.experts.0.gate_proj.weight" in tensors
    save_file(tensors, file, {"format": "pt"})
    check_merge(run, set(tensors))


def test_a_base_with_code_of_its_own_that_holds_whole_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_code_in(tmp_path / "modules", monkeypatch)
    run = write_run("qwen3_moe", tmp_path)
    base = tmp_path / "base"
    state = {name: t.clone() for name, t in AutoModelForCausalLM.from_pretrained(base).state_dict().items()}
    assert state["model.layers.1.mlp.experts.gate_up_proj"].dim() == 3
    save_file(state, base / "model.safetensors", {"format": "pt"})
    for name, text in CODE.items():
        (base / name).write_text(text)
    edited(base / "config.json", model_type="own_moe", architectures=["OwnForCausalLM"], auto_map=MAP)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["model"]["trust_remote_code"] = True
    (run / "manifest.json").write_text(json.dumps(manifest))
    check_merge(run, set(state))


def test_a_family_whose_files_transformers_finds_by_regular_expressions(tmp_path: Path) -> None:
    run = write_run("kimi_linear", tmp_path)
    names = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in names
    check_merge(run, names)
