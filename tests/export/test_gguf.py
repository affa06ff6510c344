"""GGUF files of a trained tiny model: read back, compared on logits in llama.cpp, and refused when they differ."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import configured
from safetensors.torch import load_file, save_file

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.gguf import export_adapter, export_run
from qlora_sft.export.gguf_check import check_gguf, compare_rope, lost_window
from qlora_sft.export.llama_tools import find_quantizer
from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import BOUNDS, Figures, _judge, bound, check_parity, compare
from qlora_sft.export.quantize import QUANTIZED
from qlora_sft.gguf_file import read_gguf
from qlora_sft.train import train


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def merged(convertible_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps at a rate that changes the answers; merged in float32, so that every difference is the export's."""
    folder = tmp_path_factory.mktemp("merged")
    held_out = folder / "held_out.jsonl"
    turns = [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "It scatters light."},
    ]
    held_out.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    config = configured(folder, convertible_model)(
        "training.max_steps=2", "training.learning_rate=3e-2", "model.chat_template=chatml-think",
        f"data.held_out=[{{path: {held_out}}}]",
    )  # fmt: skip
    run = Path(train(config, say=quiet).output)
    merge_run(run, say=quiet)
    return run


@pytest.fixture
def run(merged: Path, tmp_path: Path) -> Path:
    return shutil.copytree(merged, tmp_path / "run")


@pytest.fixture(scope="module")
def exported(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Figures, list[str]]:
    """The run in f16, which is compared, and in q8_0; the figures and what was said of the first."""
    run = shutil.copytree(merged, tmp_path_factory.mktemp("exported") / "run")
    said: list[str] = []
    parity = export_run(run, "f16", parity=True, say=said.append).parity
    export_run(run, "q8_0", say=quiet)
    assert parity is not None
    return run, parity["f16"], said


def test_f16_and_q8_0_are_the_merged_model(exported: tuple[Path, Figures, list[str]]) -> None:
    run, figures, said = exported
    assert figures.top1 >= BOUNDS["f16"][0]
    assert any("held-out rows" in line for line in said)
    kept = json.loads((run / "export.json").read_text())
    assert kept["parity"]["f16"] == figures.to_json()
    assert set(figures.to_json()) == {"top1", "kl", "max_diff", "tokens", "ties"}
    assert kept["parity"]["merged"]["kl"] < 1e-6
    assert "0c1e57098" in kept["gguf"]["f16"]["llama_cpp"]
    assert (run / "gguf" / "run-q8_0.gguf").is_file()


def test_the_adapter_alone_is_the_adapter(make_config: Any, convertible_model: Path) -> None:
    """With scales and ranks that llama.cpp does not know of."""
    config = make_config(
        "training.max_steps=2", "training.learning_rate=1e-2", "model.chat_template=chatml-think", "lora.rslora=true",
        "lora.modules=[{match: down_proj, r: 4, alpha: 9}]", f"model.path={convertible_model}",
    )  # fmt: skip
    run = Path(train(config, say=quiet).output)
    figures = export_adapter(run, parity=True, say=quiet).parity["lora"]
    assert figures.top1 >= BOUNDS["lora"][0]
    names = sorted(path.name for path in (run / "gguf").iterdir())
    assert names == ["run-adapter.Modelfile", "run-adapter.gguf"]


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "beside a tower"])
@pytest.mark.parametrize("by_layer", [False, True], ids=["one set", "a set per type of layer"])
def test_rope_is_compared_wherever_a_config_has_it(nested: bool, by_layer: bool) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    sets = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": rope}
    text = {"max_position_embeddings": 4096, "rope_parameters": sets if by_layer else rope}
    config: dict[str, Any] = {"text_config": text, "vision_config": {}} if nested else text
    right = {
        "general.architecture": "gemma3", "gemma3.rope.freq_base": 1e6, "gemma3.rope.scaling.type": "linear",
        "gemma3.context_length": 4096,
    }  # fmt: skip
    assert list(compare_rope(right, config)) == []
    for name, fault in (
        ("rope.freq_base", "rope: base"),
        ("context_length", "context: "),
        ("rope.scaling.type", "rope: s"),
    ):
        (found,) = compare_rope({**right, f"gemma3.{name}": 7}, config)
        assert found.startswith(fault)


def test_a_sliding_window_that_the_file_lacks_is_found() -> None:
    mistral, has = {"sliding_window": 4096}, {"gemma3.attention.sliding_window": 4096}
    assert lost_window({}, mistral) == 4096
    assert lost_window({}, {"text_config": {**mistral, "layer_types": ["full_attention", "sliding_attention"]}}) == 4096
    assert lost_window(has, mistral) is None
    for unused in ({"use_sliding_window": False}, {"layer_types": ["full_attention"]}, {"sliding_window": None}):
        assert lost_window({}, {**mistral, **unused}) is None


def test_a_file_that_is_another_model_is_refused(run: Path, exported: Any, tmp_path: Path) -> None:
    gguf = exported[0] / "gguf" / "run-f16.gguf"
    check_gguf(gguf, run / "merged")
    other = tmp_path / "other"
    shutil.copytree(run / "merged", other)
    tensors = load_file(other / "model.safetensors")
    q_proj = "model.layers.1.self_attn.q_proj.weight"
    tensors[q_proj] = tensors[q_proj].flip(0).contiguous()
    tensors["model.norm.weight"] = -tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (other / "config.json").write_text(json.dumps(config))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(RunError) as caught:
        check_gguf(gguf, other)
    for part in ("blk.1.attn_q.weight: differs", "rope: base", "chat template"):
        assert part in str(caught.value)
    with pytest.raises(RunError, match="Suspect"):
        check_parity(run, other, say=quiet)
    assert (run / "merged").is_dir()


def test_the_bound_that_is_printed_is_the_one_that_holds() -> None:
    """It is wider where there are few tokens, and a figure beyond it is a fault."""
    for tokens, top1, passes in (
        (270, 0.9889, True),
        (270, 0.97, False),
        (100_000, 0.99, False),
        (100_000, 0.995, True),
    ):
        said: list[str] = []
        faults = _judge("merged", Figures(top1=top1, kl=0.0, max_diff=0.0, tokens=tokens), "adapter", True, said.append)
        (least,) = re.findall(r"at least ([\d.]+)%, 99.5% of many", said[0])
        assert (faults == []) == passes == (top1 >= float(least) / 100)


def test_near_ties_are_no_fault_of_a_rounded_model() -> None:
    """A model of a few steps is undecided in many places; weights of 16 bits have to find the same all the same."""
    reference = np.log(np.tile([[0.30, 0.28, 0.22, 0.20]], (200, 1)))
    tie, wrong = reference.copy(), reference.copy()
    tie[:20, [0, 1]] = tie[:20, [1, 0]]
    wrong[:20, [0, 2]] = wrong[:20, [2, 0]]
    for form, other, passes in (("q8_0", tie, True), ("q8_0", wrong, False), ("f16", tie, False)):
        figures, said = compare(reference, other), list[str]()
        assert (figures.top1, figures.ties) == (0.9, 0.1 if other is tie else 0.0)
        assert figures.kl < 0.01
        assert (_judge(form, replace(figures, kl=0.0), "merged", True, said.append) == []) == passes
        assert ("100.00% with near ties" in said[0]) == passes


def test_a_failed_check_leaves_no_file(run: Path, exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(model: Path, target: Path, *_: Any) -> None:
        shutil.copy(exported[0] / "gguf" / "run-f16.gguf", target)

    def fail(*_: Any) -> None:
        raise RunError("differs")

    monkeypatch.setattr("qlora_sft.export.gguf.convert", convert)
    monkeypatch.setattr("qlora_sft.export.gguf.check_gguf", fail)
    with pytest.raises(RunError, match="differs"):
        export_run(run, "f16", say=quiet)
    assert not (run / "gguf").exists()


def test_unknown_types_and_a_missing_quantizer_name_the_cure(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--quant q9: one of f32"):
        export_run(run, "q9")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RunError, match="cmake and c\\+\\+ is missing"):
        export_run(run, "q4_k_m", say=quiet)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["q4_0", "iq4_nl", "q5_1"])
def test_types_of_the_quantizer(run: Path, quant: str) -> None:
    """32-wide blocks, because the tiny model is 64 wide; builds the quantizer if there is none."""
    result = export_run(run, quant, say=quiet)
    assert find_quantizer() is not None
    assert Path(result.gguf).is_file()


def test_every_type_has_bounds_that_get_looser_with_size() -> None:
    assert bound("q4_k_m") == BOUNDS["q4"]
    assert bound("iq4_xs") == BOUNDS["iq4"]
    assert all(bound(quant) in BOUNDS.values() for quant in QUANTIZED)
    assert bound("q8_0")[0] > bound("q6_k")[0] > bound("q4_k_m")[0] > bound("q2_k")[0]


def test_the_figures_are_what_they_say() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(300, 50, dtype=torch.float64), torch.randn(300, 50, dtype=torch.float64)
    figures = compare(a.float().numpy(), np.pad(b.float().numpy(), ((0, 0), (0, 6)), constant_values=99.0))
    p, q = a.log_softmax(1), b.log_softmax(1)
    assert figures.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
    assert figures.top1 == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    assert figures.max_diff == pytest.approx(float((a - b).abs().max()), rel=1e-5)
    assert figures.tokens == 300
    assert compare(a.numpy(), a.numpy()).kl == 0


def test_a_runtime_asks_as_was_trained(exported: Any) -> None:
    """llama.cpp turns thinking on unasked; where the data has none, the file must not change for it."""
    from transformers import AutoTokenizer

    run = exported[0]
    fields = read_gguf(run / "gguf" / "run-q8_0.gguf").fields
    assert fields["general.name"] == "run"
    assert "general.finetune" not in fields
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    trained = tokenizer.apply_chat_template(chat, tokenize=False)
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    for mode in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        assert tokenizer.apply_chat_template(chat, tokenize=False, **mode) == trained
