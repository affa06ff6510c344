"""Tiny models of every causal architecture that the installed transformers knows, made from its own configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_sft.model.meta_model import auto_class

# Sizes by the names that configurations give them; a configuration takes those that it has.
SMALL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0, "sliding_window": 8, "attention_window": 8, "attention_chunk_size": 8,
    # Older names
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "n_inner": 128, "d_model": 64, "max_position": 256,
    "rotary_dim": 16, "embedding_size": 64, "num_layers": 4, "decoder_layers": 2, "encoder_layers": 1,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128,
    "ffn_dim": 128, "dff": 128, "dim_ff": 128, "dim_head": 16, "num_decoder_layers": 2, "num_encoder_layers": 1,
    # Experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_intermediate_size": 64, "moe_num_experts": 4, "shared_expert_intermediate_size": 64, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "expert_ffn_hidden_size": 64,
    "moe_latent_size": 32, "moe_shared_expert_intermediate_size": 64, "zero_expert_num": 1, "moe_topk": 2,
    "ffn_hidden_size": 128,
    # Latent attention
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    # Recurrent and convolutional layers
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_d_ssm": 128, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "state_size": 16,
    "num_heads": 8, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "n_groups": 1, "chunk_size": 16,
    "mamba_chunk_size": 16, "expand": 2, "lru_width": 64,
    # Towers
    "depth": 2, "embed_dim": 64,
    # Further embeddings
    "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16, "global_head_dim": 32,
}  # fmt: skip
MLA = {"num_key_value_heads": 4}
# Of the 8 pairs of a head, those that turn with time, height and width.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}}
TWO_KINDS = ["linear_attention", "full_attention"] * 2
# What a family's configuration asks for beside small sizes, so that every kind of layer that it has is there.
OWN: dict[str, dict[str, Any]] = {
    "axk1": MLA, "axk2": MLA, "deepseek_v2": MLA, "deepseek_v3": MLA, "deepseek_v32": MLA, "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA, "longcat_flash": MLA, "minicpm3": MLA, "youtu": MLA, "kimi_k25": MLA, "dots3_note": MLA,
    "dots3_note_text": MLA, "sarvam_mla": MLA, "mistral_large4": MLA,
    "mistral4": {**MLA, "head_dim": 32},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    # The whole model leaves out the cap of the language model, and no published one has one.
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 30.0},
    "gemma3n_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "intermediate_size": [128] * 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": TWO_KINDS},
    "inkling2_text": {"unpadded_vocab_size": 256}, "inkling2_loop_text": {"unpadded_vocab_size": 256},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": TWO_KINDS, **MLA},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"layer_types": ["linear_attention", "mlp", "full_attention", "moe"]},
    "qwen2_vl": MROPE, "qwen2_5_vl": MROPE, "qwen2_5_omni_thinker": MROPE, "glm_ocr": MROPE, "paddleocr_vl": MROPE,
    "glm4v": MROPE, "glm46v": MROPE, "glmga": MROPE, "hunyuan_vl": MROPE, "hy_v4_vl": MROPE,
    "glm4v_moe": {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2]}},
    "reformer": {"axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"num_hidden_layers": 5, "layer_types": [
        "linear_attention", "hybrid", "linear_attention", "linear_attention", "hybrid",
    ], "num_mem_blocks": 1, "hybrid_layer_ids": [1, 4]},
}  # fmt: skip


def tiny_config(kind: str, **own: Any) -> Any:
    """Returns transformers' configuration of the model type ``kind``, with small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    default = made()
    names = set(default.to_dict()) | set(getattr(made, "attribute_map", {}))
    parts = {name: getattr(default, name, None) or part() for name, part in made.sub_configs.items()}
    sizes = {name: small(set(part.to_dict())) for name, part in parts.items()}
    if "text_config" in sizes:
        sizes["text_config"]["model_type"] = parts["text_config"].model_type  # EXAONE 4.5 asks for it
        sizes["text_config"] |= OWN.get(kind, OWN.get(f"{kind}_text", {})) | own
        config = made(**sizes)
    else:
        config = made(**{**sizes, **small(names), **OWN.get(kind, {}), **own})
    if getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    return config


def small(names: set[str]) -> dict[str, Any]:
    """Returns the sizes that a configuration with these names takes."""
    return {name: value for name, value in SMALL.items() if name in names}


def tiny_model(kind: str, **own: Any) -> Any:
    """Returns a model of that type with random weights in float32, large enough for every part to have an effect.

    One that also sees has its towers, as its published checkpoints do.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = tiny_config(kind, **own)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    made: Any = AutoModelForImageTextToText if sees else auto_class(config)
    model = made.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name or "sinks" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # what decides between experts beside their scores
            torch.nn.init.normal_(buffer, std=0.1)
    return model


def write_tiny(kind: str, folder: Path, **own: Any) -> Path:
    """Writes such a model into ``folder``, and returns that."""
    tiny_model(kind, **own).save_pretrained(folder)
    return folder
