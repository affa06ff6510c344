"""The merged folder against the adapter it came from, and everything that can be wrong with either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_sft.errors import RunError
from qlora_sft.export.merge import merge_run, without_generation_marks
from qlora_sft.model.load import load_for_inference
from qlora_sft.train import train


@pytest.fixture
def run(make_config: Any) -> Path:
    """A run of two steps at a rate that changes the answers."""
    config = make_config("training.max_steps=2", "training.learning_rate=3e-2", "model.chat_template=chatml-think")
    return Path(train(config, say=lambda _: None).output)


PROBE = torch.arange(20, 60)[None]


def logits(path: Path) -> torch.Tensor:
    """Of a run's adapter, or of a model folder in plain transformers; float32."""
    if (path / "adapter").is_dir():
        model = load_for_inference(path)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def test_the_merged_model_computes_what_the_adapter_computes(run: Path) -> None:
    result = merge_run(run)
    assert result.modules == 2 * 7
    assert result.onto == "bf16"
    adapter, merged = logits(run), logits(run / "merged")
    base = logits(Path(json.loads((run / "manifest.json").read_text())["report"]["base"]))
    torch.testing.assert_close(merged, adapter, rtol=1e-4, atol=1e-4)
    assert (adapter - base).abs().max() > 0.1


def test_the_merged_folder_needs_nothing_of_ours_and_has_the_trained_template(run: Path) -> None:
    from transformers import AutoTokenizer

    merge_run(run)
    trained, merged = (AutoTokenizer.from_pretrained(run / name) for name in ("adapter", "merged"))
    assert "generation" not in merged.chat_template.replace("add_generation_prompt", "").split("-#}")[-1]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]
    for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}, {"add_generation_prompt": True}):
        texts = [t.apply_chat_template(chat, tokenize=False, **options) for t in (trained, merged)]
        assert texts[0] == texts[1]


def test_a_merge_onto_nf4_is_what_the_4bit_model_computed_with(make_config: Any) -> None:
    config = make_config("model.load_in_4bit=true", "training.max_steps=2", "training.learning_rate=3e-2")
    run = Path(train(config, say=lambda _: None).output)
    assert merge_run(run).onto == "nf4-dequantized"
    adapter = logits(run)
    exact = (logits(run / "merged") - adapter).norm()
    merge_run(run, run / "merged16", onto="bf16")
    onto_bf16 = (logits(run / "merged16") - adapter).norm()
    assert exact < 1e-3 * adapter.norm()
    assert exact < onto_bf16 / 10


def shard(folder: Path) -> None:
    """Splits model.safetensors in two with an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def sharded(run: Path, tmp_path: Path) -> Path:
    """The run, on a copy of its base in two shards."""
    manifest = json.loads((run / "manifest.json").read_text())
    copy = tmp_path / "sharded"
    shutil.copytree(manifest["report"]["base"], copy)
    shard(copy)
    manifest["report"]["base"] = str(copy)
    (run / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_shards_are_merged_one_by_one(run: Path, sharded: Path) -> None:
    merge_run(run)
    assert len(list((run / "merged").glob("model-*.safetensors"))) == 2
    torch.testing.assert_close(logits(run / "merged"), logits(run), rtol=1e-4, atol=1e-4)


def nothing_under_the_final_name(run: Path) -> bool:
    return not (run / "merged").exists() and not list(run.glob(".merged*"))


def test_a_missing_shard_leaves_nothing(run: Path, sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RunError, match=r"model-00002-of-00002\.safetensors is missing"):
        merge_run(run)
    assert nothing_under_the_final_name(run)


def edit_adapter(run: Path, edit: Any) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_the_adapter_of_another_base_is_refused(run: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "layers.1." in name:
                tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)

    edit_adapter(run, rename)
    with pytest.raises(RunError, match="7 of 14 adapter modules have no weight"):
        merge_run(run)
    assert nothing_under_the_final_name(run)


def test_other_weights_of_the_same_shape_are_refused(run: Path, sharded: Path) -> None:
    """The same weights in other files are fine, one that was trained on is not."""
    report = json.loads((run / "manifest.json").read_text())["report"]
    assert report["dtype"] == "float32"
    file = sharded / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match="not the weights that the adapter was trained on"):
        merge_run(run)
    assert nothing_under_the_final_name(run)


def test_an_adapter_of_the_wrong_shape_and_a_damaged_one(run: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = torch.zeros(16, 99)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in tensors if "lora_B" in name)].fill_(float("nan"))

    original = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for edit, message in ((widen, "the adapter is for a weight"), (poison, "not finite")):
        (run / "adapter" / "adapter_model.safetensors").write_bytes(original)
        edit_adapter(run, edit)
        with pytest.raises(RunError, match=message):
            merge_run(run)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(original[:-100])
    with pytest.raises(RunError, match="not a readable adapter"):
        merge_run(run)
    assert nothing_under_the_final_name(run)


def test_marks_are_replaced_with_their_white_space() -> None:
    assert (
        without_generation_marks("a {%- generation -%} b {% endgeneration -%} c")
        == "a {%- if true -%} b {% endif -%} c"
    )
