"""The config.json of bases that the shipped recipes name, as published: what a plan needs to know of them."""

from __future__ import annotations

from typing import Any

LLAMA_3_1_8B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 4096,
    "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936, "hidden_size": 4096,
    "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "rope_theta": 1_000_000.0, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM3_3B: dict[str, Any] = {
    "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128_256, "hidden_size": 2048,
    "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
    "rope_theta": 5_000_000.0, "max_position_embeddings": 65_536, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA_3_1B: dict[str, Any] = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262_144, "hidden_size": 1152,
    "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 256, "sliding_window": 512, "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0,
}  # fmt: skip
# As its 16-bit copy has it: without the quantisation of the published files.
GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "vocab_size": 201_088, "hidden_size": 2880,
    "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4, "sliding_window": 128,
    "max_position_embeddings": 131_072, "initial_context_length": 4096, "rope_theta": 150_000, "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "attention_bias": True, "tie_word_embeddings": False, "output_router_logits": False, "router_aux_loss_coef": 0.9,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "swiglu_limit": 7.0,
}  # fmt: skip

BASES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3_1_8B,
    "Qwen/Qwen3-8B": QWEN3_8B,
    "HuggingFaceTB/SmolLM3-3B-Base": SMOLLM3_3B,
    "google/gemma-3-1b-it": GEMMA_3_1B,
    "openai/gpt-oss-20b": GPT_OSS_20B,
}
