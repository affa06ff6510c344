"""Makes a base model ready to be trained: NF4 and LoRA, attention by document, our norms, MLPs and loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from qlora_sft.config import Config
from qlora_sft.config_lora import describe_lora
from qlora_sft.model.allocator import describe_allocator
from qlora_sft.model.attention_check import use_checked_attention
from qlora_sft.model.attention_choice import AttentionChoice
from qlora_sft.model.backend import BackendName
from qlora_sft.model.balance import describe_balance
from qlora_sft.model.base import base_of
from qlora_sft.model.base_files import hub_origin
from qlora_sft.model.base_folder import own_folder
from qlora_sft.model.embeddings import use_host_embedding
from qlora_sft.model.experts import describe_experts
from qlora_sft.model.go_on import check_adapter, start_from
from qlora_sft.model.linears import describe_linears
from qlora_sft.model.load import load_model
from qlora_sft.model.lora_init import begin_adapters, check_shapes
from qlora_sft.model.loss import use_loss
from qlora_sft.model.loss_check import check_logits
from qlora_sft.model.mlp import use_tiled_mlp
from qlora_sft.model.norms import use_lean_norms
from qlora_sft.model.qkv import use_lean_attention
from qlora_sft.model.shards import cut_base, in_turn
from qlora_sft.model.sixteen_bit import packed_as
from qlora_sft.model.trained_rows import use_rows_beside_embedding
from qlora_sft.say import Say

if TYPE_CHECKING:
    from peft import PeftModel


def prepare_model(
    config: Config,
    base: str,
    dtype: torch.dtype,
    backend: BackendName,
    tokens: int,
    say: Say,
    attention: AttentionChoice | None = None,
) -> PeftModel:
    """Loads ``base`` in NF4 with LoRA for rows of up to ``tokens``, attending inside documents only.

    attention: the way to attend (`settle_attention`); default: varlen.
    """
    cut = config.memory.base_shards > 1
    with in_turn() if cut else nullcontext():
        model = load_adapted(config, base, dtype, backend, say)
        if cut:
            say(f"base: {cut_base(model)}")
    if model.device.type == "cuda":
        say(f"GPU memory: {describe_allocator()}")
    use_rows_beside_embedding(model)
    say(f"linear layers: {describe_linears(model)}")
    use_checked_attention(model, dtype, say, *(attention or AttentionChoice("varlen", "")))
    if config.memory.offload_embeddings:
        on_gpu = model.device.type == "cuda"
        say(f"embeddings: {use_host_embedding(model) if on_gpu else 'where they are (the model is in host memory)'}")
    experts = describe_experts(model, config.lora)
    if experts:
        say(f"experts: {experts}; load-balance loss: {describe_balance(base_of(model))}")
    say(f"norms: {use_lean_norms(model)}")
    say(f"q, k, v and o by nf4_lora: {use_lean_attention(model)}")
    say(f"tiled MLP: {use_tiled_mlp(model, config.memory.tiled_mlp, tokens)}")
    check_logits(model, dtype, say)
    say(f"loss: {use_loss(model, config.model.loss)}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    origin = hub_origin(config.model.path, base)
    name = f"{origin.name} at commit {origin.commit}" if origin else own_folder(base)
    packed = packed_as(base)
    source = f"{name}, dequantised from {packed}" if packed else name
    say(f"model: {source}, {describe_lora(config.lora)}, {trainable:,} trainable parameters")
    return model


def load_adapted(config: Config, base: str, dtype: torch.dtype, backend: BackendName, say: Say) -> PeftModel:
    """Loads ``base`` with adapters that have their beginning."""
    model = load_model(config, base, dtype, backend)
    check_shapes(model, config.lora)
    if config.lora.from_:
        check_adapter(config, base)  # once more: the weights of a base of the Hub are here only now
        say(f"adapter: {start_from(model, config.lora.from_)}")
    elif begun := begin_adapters(model, config.lora, base, config.seed):
        say(f"adapter: {begun}")
    return model
