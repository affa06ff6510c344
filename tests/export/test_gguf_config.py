"""What llama.cpp's converter reads of a model's configuration: names and values of its own, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_sft.errors import ConfigError
from qlora_sft.export.gguf_config import config_for_converter

LAYERS = ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
DEEPSEEK = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "q_lora_rank": 8, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_a_family_that_needs_nothing_keeps_its_configuration(kind: str) -> None:
    config: Any = {"model_type": kind, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    assert config_for_converter(config, LAYERS) is config


def test_the_router_of_deepseek_v3_scores_with_a_sigmoid_whether_its_configuration_says_so_or_not() -> None:
    assert config_for_converter(DEEPSEEK, LAYERS) == {**DEEPSEEK, "scoring_func": "sigmoid"}
    inner: Any = {"model_type": "kimi_k25", "text_config": DEEPSEEK}
    assert config_for_converter(inner, LAYERS)["text_config"] == {**DEEPSEEK, "scoring_func": "sigmoid"}
    assert "scoring_func" not in DEEPSEEK


def test_a_query_that_is_not_compressed_and_groups_that_limit_nothing_are_told_as_llama_cpp_takes_them() -> None:
    written = config_for_converter({**DEEPSEEK, "q_lora_rank": None, "topk_group": 4}, LAYERS)
    assert (written["q_lora_rank"], written["n_group"], written["topk_group"]) == (0, 1, 1)
    assert config_for_converter(DEEPSEEK, LAYERS)["n_group"] == 4
    greedy: Any = {"model_type": "deepseek_v2", "topk_method": "greedy", "n_group": 4, "topk_group": 2}
    written = config_for_converter({**greedy, "norm_topk_prob": True}, LAYERS)
    assert (written["n_group"], written["norm_topk_prob"]) == (1, False)


@pytest.mark.parametrize(
    ("further", "kept"),
    [([], 0), (["model.layers.2.eh_proj.weight"], 1), (["mtp.fc.weight"], 1), (["model.layers.1.x.weight"], 0)],
)
def test_layers_that_guess_further_tokens_are_only_named_where_the_files_have_them(
    further: list[str], kept: int
) -> None:
    config: Any = {"model_type": "glm4_moe", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    assert config_for_converter(config, [*LAYERS, *further])["num_nextn_predict_layers"] == kept


def test_a_nemotron_h_without_experts_is_described_as_it_was_published() -> None:
    layers = ["linear_attention", "mlp", "full_attention", "mlp"]
    config: Any = {
        "model_type": "nemotron_h", "layers_block_type": layers, "n_groups": 2, "n_group": 1, "num_experts_per_tok": 2,
        "n_routed_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 32, "mamba_num_heads": 4,
    }  # fmt: skip
    written = config_for_converter(config, LAYERS)
    assert written == {
        "model_type": "nemotron_h_dense", "architectures": ["NemotronHForCausalLM"], "num_hidden_layers": 4,
        "hybrid_override_pattern": "M-*-", "n_groups": 2, "intermediate_size": 32, "mamba_num_heads": 4,
    }  # fmt: skip
    published: Any = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*-", "intermediate_size": 32}
    assert config_for_converter(published, LAYERS)["hybrid_override_pattern"] == "M-*-"
    mixture = {**config, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}
    assert config_for_converter(mixture, LAYERS) is mixture


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"model_type": "nemotron_h", "layers_block_type": ["mlp", "moe"]}, "layers_block_type"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-*E"}, "layers_block_type"),
        (
            {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            "group_limited_greedy",
        ),
        ({**DEEPSEEK, "rope_interleave": False}, "rope_interleave"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob"),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text", "attention_chunk_size": 64}}, "8192"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_with_its_setting(config: Any, cause: str) -> None:
    with pytest.raises(ConfigError, match=rf"no GGUF of this \w+: .*{cause}.*merged folder"):
        config_for_converter(config, LAYERS)
