"""Tiny mixtures of experts, one of each family, with random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Shared experts are linear layers, which bitsandbytes reads wrongly on a CPU where they are no whole blocks wide.
SHARED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _config(kind: str, **settings: Any) -> Any:
    return partial(getattr(transformers, f"{kind}Config"), **{**SHAPE, **settings})


MLA = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
FAMILIES: dict[str, Any] = {
    "qwen3_moe": _config("Qwen3Moe", **ROUTED, num_experts=8, head_dim=16, norm_topk_prob=True),
    "mixtral": _config("Mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=32),
    "gpt_oss": _config(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, head_dim=16, sliding_window=8,
    ),
    "deepseek_v3": _config(
        "DeepseekV3", **SHARED, **MLA, n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1,
        first_k_dense_replace=1, num_key_value_heads=4, num_hidden_layers=3,
    ),
    "glm4_moe": _config(
        "Glm4Moe", **SHARED, n_routed_experts=8, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
        head_dim=16,
    ),
    "granite_moe": _config("GraniteMoe", num_local_experts=4, num_experts_per_tok=2, intermediate_size=32),
    "olmoe": _config("Olmoe", num_experts=8, num_experts_per_tok=2, intermediate_size=32),
    "ernie4_5_moe": _config(
        "Ernie4_5_Moe", moe_num_experts=8, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=1,
    ),
    "llama4_text": _config(
        "Llama4Text", num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, intermediate_size_mlp=64,
        interleave_moe_layer_step=1, head_dim=16, attention_chunk_size=16,
    ),
    "phimoe": _config("Phimoe", num_local_experts=4, num_experts_per_tok=2, intermediate_size=32),
}  # fmt: skip


def settings_of(family: str) -> Any:
    return FAMILIES[family]()


def write_base(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, tokenizer: Any = None, **own: Any
) -> Path:
    """A model of the family in ``folder``, as transformers saves it: with the names that the family's files have.

    own: settings in place of the family's.
    """
    torch.manual_seed(0)
    settings = settings_of(family)
    for name, value in own.items():
        setattr(settings, name, value)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    for name, parameter in model.named_parameters():
        # Routers that choose, experts that differ, and biases that are felt.
        if parameter.dim() > 1 or "bias" in name or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.12)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
