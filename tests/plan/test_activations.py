"""What a layer keeps, from its shapes, is what autograd saves; measured for several families, exactly."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from qlora_kernels.nf4_lora import gated
from qlora_kernels.offload.tiers import Tier, peak_bytes
from tiny_models import tiny_config
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from qlora_sft.config import Config, load_config
from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.layer_bytes import memory_use
from qlora_sft.model.linears import target_modules
from qlora_sft.model.load import load_base, load_model
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.loss_bytes import between_bytes
from qlora_sft.model.mlp import TiledMLP, set_recompute, use_tiled_mlp
from qlora_sft.model.norms import use_lean_norms
from qlora_sft.model.qkv import use_lean_attention
from qlora_sft.plan import activations
from qlora_sft.plan.activations import layer_bytes
from qlora_sft.plan.blueprint import Blueprint, blueprint_of, read_blueprint
from qlora_sft.plan.random_model import random_model

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "mistral": MistralConfig(**SHAPE),
    "smollm3": SmolLM3Config(**SHAPE),
    # A cap leaves the memory-saving path, on a CPU.
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, attn_logit_softcapping=None),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16),
    "phi3": Phi3Config(**SHAPE),
    # Its norms of queries and keys have names of their own.
    "hunyuan": HunYuanDenseV1Config(**SHAPE, head_dim=16),
}


def like_on_a_gpu(_: Any, q: Tensor, k: Tensor, v: Tensor, __: Any, scaling: Any = None, **___: Any) -> Any:
    """The tensors that varlen FlashAttention keeps: q, k, v token by token, its result, the log-sum-exp."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2), None


@contextmanager
def arithmetic(model: Any, dtype: torch.dtype, on_gpu: bool) -> Iterator[None]:
    """Autocast on the CPU; as on a GPU, PEFT's 4-bit layers are told so, which ask for a GPU's autocast only."""
    if on_gpu:
        AttentionInterface.register("like_on_a_gpu", like_on_a_gpu)
        AttentionMaskInterface.register("like_on_a_gpu", lambda *_, **__: None)
        model.get_base_model().set_attn_implementation("like_on_a_gpu")
    else:
        use_document_attention(model)
    torch.set_autocast_enabled("cuda", on_gpu and dtype != torch.float32)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def plain(blueprint: Blueprint) -> Blueprint:
    """Of a model whose RMSNorms are left to transformers, and q, k, v and o to PEFT."""
    return replace(blueprint, lean_norms=False, why_not_lean="a test")


def run_layer(model: Any, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(result of the second decoder layer, what all layers share)"""
    decoder = model.get_base_model().get_decoder()
    tokens = hidden.shape[1]
    positions = torch.arange(tokens)[None]
    types = getattr(decoder.config, "layer_types", None)
    per_type = "gemma3" in decoder.config.model_type
    rotation = decoder.rotary_emb(hidden, positions, *([types[1]] if per_type else []))
    bounds = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    out = decoder.layers[1](
        hidden, position_embeddings=rotation, position_ids=positions, cu_seq_lens_q=bounds, max_length_q=tokens
    )
    return out, list(rotation)


def pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def saved_bytes(model: Any, dtype: torch.dtype, tokens: int, on_gpu: bool) -> int:
    """Of every storage that autograd saves in one decoder layer, without parameters; with the layer's input."""
    saved: dict[int, Tensor] = {}
    hidden = torch.randn(1, tokens, model.config.hidden_size, dtype=dtype, requires_grad=True)

    def note(tensor: Tensor) -> Tensor:
        saved[pointer(tensor)] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with arithmetic(model, dtype, on_gpu), hooks:
        _, shared = run_layer(model, hidden)
    saved[pointer(hidden)] = hidden
    others = {pointer(t) for t in [*model.parameters(), *model.buffers(), *shared]}
    packed = [t for key, t in saved.items() if key not in others and t.dtype != torch.uint8]
    return sum(t.untyped_storage().nbytes() for t in packed)


def with_lora(settings: Any, folder: Path, config: Config, dtype: torch.dtype) -> Any:
    AutoModelForCausalLM.from_config(deepcopy(settings), dtype=dtype).save_pretrained(folder)
    base = load_base(str(folder), dtype, config.model.load_in_4bit).requires_grad_(False)
    lora = config.lora
    return get_peft_model(
        base, PeftLoraConfig(r=lora.r, lora_dropout=lora.dropout, target_modules=target_modules(base, lora))
    ).train()


def tiled(model: Any, again: bool, tokens: int) -> bool:
    """Tiles the MLPs of ``model`` if that can be done, of layers that are kept or computed again."""
    use_tiled_mlp(model, "auto", tokens)
    blocks = model.get_base_model().get_decoder().layers
    for block in blocks:
        set_recompute(block, again, tokens)
    return isinstance(blocks[1].mlp, TiledMLP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_is_what_autograd_saves(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of rows shorter and longer than a tile, with transformers' MLP and the tiled one."""
    config = load_config("demo", ["lora.r=4", "memory.tiled_mlp=off"])
    model = with_lora(FAMILIES[family], tmp_path, config, dtype)
    untiled = plain(blueprint_of(deepcopy(FAMILIES[family]), config))
    for on_gpu in (False, True):
        planned = layer_bytes(untiled, 75, config.lora, dtype, on_gpu)
        assert planned.kept == planned.recomputed == saved_bytes(model, dtype, 75, on_gpu)
    blueprint = plain(blueprint_of(deepcopy(FAMILIES[family]), load_config("demo", ["lora.r=4"])))
    assert (not blueprint.why_not_tiled) == tiled(model, False, 75) == (family not in ("phi3", "hunyuan"))
    for on_gpu, tokens in ((False, 75), (True, 75), (True, 1100)):
        planned = layer_bytes(blueprint, tokens, config.lora, dtype, on_gpu)
        tiled(model, False, tokens)
        assert planned.kept == saved_bytes(model, dtype, tokens, on_gpu), (on_gpu, tokens)
        tiled(model, True, tokens)
        assert planned.recomputed == saved_bytes(model, dtype, tokens, on_gpu), (on_gpu, tokens)


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.dropout=0.1",),
        ("model.load_in_4bit=false",),
        ("lora.target_modules=[q_proj, v_proj]",),
        ("lora.target_modules=[o_proj, up_proj, down_proj]",),
    ],
)
def test_with_dropout_without_4_bits_and_with_some_modules_only(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = load_config("demo", ["lora.r=4", *overrides])
    model = with_lora(FAMILIES["llama"], tmp_path, config, torch.bfloat16)
    for mlp in ("off", "auto"):
        config = load_config("demo", ["lora.r=4", f"memory.tiled_mlp={mlp}", *overrides])
        blueprint = plain(blueprint_of(deepcopy(FAMILIES["llama"]), config))
        assert (not blueprint.why_not_tiled) == (mlp == "auto" and tiled(model, False, 48))
        planned = layer_bytes(blueprint, 48, config.lora, torch.bfloat16, on_gpu=False)
        assert planned.kept == saved_bytes(model, torch.bfloat16, 48, on_gpu=False)


def test_the_real_model(base_model: Path) -> None:
    config = load_config("demo", ["model.backend=transformers"])
    model = load_model(config, str(base_model), torch.bfloat16, "transformers").train()
    blueprint = plain(read_blueprint(config, str(base_model)))
    assert tiled(model, False, 64)
    for on_gpu in (False, True):
        planned = layer_bytes(blueprint, 64, config.lora, torch.bfloat16, on_gpu)
        assert planned.kept == saved_bytes(model, torch.bfloat16, 64, on_gpu)
        assert planned.input == 64 * 576 * 2
        assert planned.attention == 64 * 9 * (64 * 2 + 4)


def peak_of_a_layer(model: Any, tokens: int) -> int:
    """Bytes at most of its forward and backward, its input and the gradient of its result included."""
    with memory_use(torch.device("cpu")) as use:
        hidden = torch.randn(1, tokens, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with arithmetic(model, torch.bfloat16, on_gpu=True):
            out, shared = run_layer(model, hidden)
        edge, gradient = get_gradient_edge(out), torch.ones_like(out)
        del out  # in training the layer that follows has had it
        torch.autograd.backward([edge], [gradient])
    return use.peak() - sum(t.nbytes for t in shared)


SLOW = ["qwen2", "qwen3", "mistral", "smollm3", "gemma2", "phi3", "hunyuan"]


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in FAMILIES])
def test_the_peak_of_a_layers_backward_is_predicted_within_4_percent(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU these are a kernel without buffers, and one whose workspace is not seen here.
    monkeypatch.setattr(gated, "BLOCK", 1024)
    monkeypatch.setattr(activations, "flash_workspace", lambda blueprint, size: 0)
    model = with_lora(FAMILIES[family], tmp_path, load_config("demo", ["lora.r=4"]), torch.bfloat16)
    for mlp in ("off", "auto"):
        config = load_config("demo", ["lora.r=4", f"memory.tiled_mlp={mlp}"])
        blueprint = plain(blueprint_of(deepcopy(FAMILIES[family]), config))
        for tokens in (768, 3072):  # with the tiled MLP less than a tile, and three
            planned = layer_bytes(blueprint, tokens, config.lora, torch.bfloat16, on_gpu=True)
            assert planned.recomputed is not None
            measured = []
            for again, kept in ((False, planned.kept), (True, planned.recomputed)):
                if mlp == "auto":
                    tiled(model, again, tokens)
                measured.append(peak_of_a_layer(model, tokens) - kept)
            whole = planned.recomputed + max(measured)
            assert planned.recomputed + planned.backward == pytest.approx(whole, rel=0.04), (mlp, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj]", "[gate_proj]"])
def test_kept_with_our_q_k_v_and_o(targets: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = load_config("demo", ["lora.r=4", f"lora.target_modules={targets}"])
    for family in ("llama", "qwen2", "qwen3", "gemma2") if targets == "all-linear" else ("llama",):
        model = with_lora(FAMILIES[family], tmp_path / family, config, dtype)
        tiled(model, False, 75)
        assert use_lean_attention(model).startswith("on")
        blueprint = replace(blueprint_of(deepcopy(FAMILIES[family]), config), lean_norms=False)
        for on_gpu in (False, True):
            planned = layer_bytes(blueprint, 75, config.lora, dtype, on_gpu)
            assert planned.kept == saved_bytes(model, dtype, 75, on_gpu), (family, on_gpu)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_with_lean_norms_and_attention(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept exactly, and the peak within 4%."""
    for module, name in ((gated, "BLOCK"), (importlib.import_module("qlora_kernels.rms_norm"), "CPU_BLOCK")):
        monkeypatch.setattr(module, name, 1024)
    monkeypatch.setattr(activations, "GPU_BLOCK", 1024)
    monkeypatch.setattr(activations, "flash_workspace", lambda blueprint, size: 0)
    config = load_config("demo", ["lora.r=4"])
    model = with_lora(FAMILIES[family], tmp_path, config, torch.bfloat16)
    assert use_lean_norms(model).startswith("on")
    assert use_lean_attention(model).startswith("on")
    blueprint = blueprint_of(deepcopy(FAMILIES[family]), config)
    planned = layer_bytes(blueprint, 3072, config.lora, torch.bfloat16, on_gpu=True)
    measured = []
    for again, kept in ((False, planned.kept), (True, planned.recomputed)):
        tiled(model, again, 3072)
        assert kept == saved_bytes(model, torch.bfloat16, 3072, on_gpu=True)
        measured.append(peak_of_a_layer(model, 3072) - kept)
    assert planned.kept + planned.backward == pytest.approx(planned.kept + max(measured), rel=0.04)


def test_layers_that_are_not_known_are_named() -> None:
    config = load_config("demo")
    blueprint = replace(blueprint_of(deepcopy(FAMILIES["llama"]), config), kind="Tomorrow")
    odd = replace(blueprint.linears[0], name="model.layers.0.mixer.in_proj")
    with pytest.raises(ConfigError, match=r"Tomorrow: what its layers keep is not known \(in_proj\)"):
        layer_bytes(replace(blueprint, linears=[odd, *blueprint.linears]), 16, config.lora, torch.bfloat16, True)


@pytest.mark.parametrize(
    ("kind", "odd"),
    [
        ("arcee", "an MLP without a gate"),
        ("apertus", "mlp.act_fn.alpha_n"),
        ("bitnet", "mlp.ffn_sub_norm, self_attn.attn_sub_norm"),
        ("diffllama", "self_attn.lambda_k1"),
        ("muse_glimmer", "2 layers named gate_proj"),
        ("olmo", "norms without a weight"),
    ],
)
def test_a_layer_of_llamas_names_that_computes_something_else_is_no_llama(kind: str, odd: str) -> None:
    """Llama's formula missed what these keep by 15% to 42%."""
    config = load_config("demo")
    blueprint = blueprint_of(tiny_config(kind), config)
    with pytest.raises(ConfigError, match=rf"what its layers keep is not known \(.*{re.escape(odd)}"):
        layer_bytes(blueprint, 16, config.lora, torch.bfloat16, True)


@pytest.mark.parametrize("vocabulary", [pytest.param(97, marks=pytest.mark.slow), 3000])
@pytest.mark.parametrize("tier", ["keep", "checkpoint"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("mlp", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_the_peak_of_a_whole_step_on_a_cpu(
    mlp: str, dtype: torch.dtype, tier: Tier, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 11%: with layers this small, temporaries of the loss that the plan leaves out weigh most."""
    monkeypatch.setattr(gated, "BLOCK", 1024)
    config = load_config("demo", ["lora.r=4", f"memory.tiled_mlp={mlp}"])
    settings = LlamaConfig(**{**SHAPE, "vocab_size": vocabulary, "num_hidden_layers": 6})
    model = random_model(deepcopy(settings), config, dtype, torch.device("cpu"))
    if tier == "checkpoint":
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
    if mlp == "on":
        tiled(model, tier == "checkpoint", 1024)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    documents = [Rendered([i % 90 + 1 for i in range(512)], [1.0] * 512, "s")] * 2
    with memory_use(torch.device("cpu")) as use:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = batch_loss(model, flatten(documents)).loss
        loss.backward()
    blueprint = plain(blueprint_of(deepcopy(settings), config))
    layer = layer_bytes(blueprint, 1024, config.lora, dtype, on_gpu=False)
    between = between_bytes(blueprint.config, 1024, dtype, on_gpu=False)
    assert peak_bytes([tier] * 6, layer, between) == pytest.approx(use.peak(), rel=0.11)
