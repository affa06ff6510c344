"""Writes a model's config.json anew for llama.cpp's converter, and refuses by name what llama.cpp cannot compute.

transformers leaves out of a configuration what its code does in any case (DeepSeek-V3's router scores with a sigmoid),
and calls some things otherwise than the published files for which the converter was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject
from qlora_sft.model.base_files import text_config

# What transformers 5 calls the layers of a Granite hybrid that it saves, and what the converter takes.
_GRANITE_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}
# The letters by which Nemotron-H's published files name its layers.
_NEMOTRON_LETTERS = {
    "linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E",
}  # fmt: skip
# In transformers these families score experts with a sigmoid whatever their configuration says, and a GGUF without a
# word of it is run with a softmax, or not at all.
_SIGMOID = ("deepseek_v3", "deepseek_v32", "dots1", "exaone_moe", "glm4_moe_lite", "kimi_linear", "minimax_m2")
_LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite")
# Parts of the names of settings that only a mixture has.
_OF_EXPERTS = ("expert", "moe_", "topk", "routed_scaling", "layers_block_type")


def config_for_converter(config: JsonObject, tensors: Iterable[str]) -> JsonObject:
    """Returns the config.json of a model as the converter needs it. ``tensors``: the names in the model's files.

    Raises `ConfigError` for a model that llama.cpp would compute differently, with the setting that is the cause.
    """
    inner = dict(text_config(config))
    kind = str(inner.get("model_type"))
    _refuse_what_llama_cpp_lacks(kind, inner)
    changed = _changed(kind, inner, list(tensors))
    if changed == text_config(config):
        return config
    return {**config, "text_config": changed} if text_config(config) is not config else changed


def _changed(kind: str, config: JsonObject, tensors: list[str]) -> JsonObject:
    """Returns the section of the language model with the names and values that the converter goes by."""
    layers = config.get("layer_types")
    if kind == "granitemoehybrid" and isinstance(layers, list):
        config["layer_types"] = [_GRANITE_LAYERS.get(str(layer), layer) for layer in layers]
    if kind in _SIGMOID:
        config["scoring_func"] = "sigmoid"
    if kind == "deepseek_v2":
        config["norm_topk_prob"] = False  # transformers scales the shares of the chosen experts in no case
    if kind in _LATENT and config.get("q_lora_rank", 0) is None:
        config["q_lora_rank"] = 0  # llama.cpp asks for a number, and takes 0 for a query that is not compressed
    if _limits_groups(config) and not _groups_matter(kind, config):
        config |= {"n_group": 1, "topk_group": 1}
    if config.get("num_nextn_predict_layers") and not _has_mtp(config, tensors):
        config["num_nextn_predict_layers"] = 0
    return _dense_nemotron(config) if kind == "nemotron_h" and "moe" not in _nemotron_layers(config) else config


def _has_mtp(config: JsonObject, tensors: list[str]) -> bool:
    """Says whether the files hold layers that guess several tokens at once. transformers does not save them."""
    layers = config.get("num_hidden_layers")
    numbers = (re.match(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.", name) for name in tensors)
    beyond = isinstance(layers, int) and any(int(found[1]) >= layers for found in numbers if found)
    return beyond or any(name.startswith(("mtp.", "model.mtp.")) for name in tensors)


def _limits_groups(config: JsonObject) -> bool:
    """Says whether the configuration has experts in groups."""
    groups = config.get("n_group")
    return isinstance(groups, int) and groups > 1


def _groups_matter(kind: str, config: JsonObject) -> bool:
    """Says whether a token is limited to the experts of some groups. llama.cpp does not start if it may use all."""
    if kind == "deepseek_v2" and config.get("topk_method") != "group_limited_greedy":
        return False
    used, groups = config.get("topk_group"), config.get("n_group")
    return not (isinstance(used, int) and isinstance(groups, int) and used >= groups)


def _nemotron_layers(config: JsonObject) -> list[str]:
    """Returns what kind each layer of a Nemotron-H is, as transformers calls it."""
    named = config.get("layers_block_type") or config.get("layer_types")
    if isinstance(named, list):
        return [str(layer) for layer in named]
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    return [kinds.get(letter, letter) for letter in str(config.get("hybrid_override_pattern") or "")]


def _dense_nemotron(config: JsonObject) -> JsonObject:
    """Returns the configuration of a Nemotron-H without experts as its published files have it.

    transformers gives every Nemotron-H the settings of a mixture, by which the converter takes it for one. It reads
    config.json itself where transformers does not know the type of the model.
    """
    layers = _nemotron_layers(config)
    kept = {
        key: value for key, value in config.items() if key != "n_group" and not any(part in key for part in _OF_EXPERTS)
    }
    pattern = "".join(_NEMOTRON_LETTERS.get(layer, layer) for layer in layers)
    return {
        **kept, "model_type": "nemotron_h_dense", "hybrid_override_pattern": pattern, "num_hidden_layers": len(layers),
        "architectures": ["NemotronHForCausalLM"],
    }  # fmt: skip


def _refuse_what_llama_cpp_lacks(kind: str, config: JsonObject) -> None:
    """Raises `ConfigError` for a setting by which llama.cpp's model would be another one."""
    for reason, there in (
        (
            "its layers are both mixtures of experts and plain MLPs (layers_block_type), and llama.cpp knows a "
            "Nemotron-H with one of the two",
            kind == "nemotron_h" and {"mlp", "moe"} <= set(_nemotron_layers(config)),
        ),
        (
            "it picks groups of experts by the best expert of each (topk_method: group_limited_greedy), and llama.cpp "
            "by the sum of the best two",
            kind == "deepseek_v2" and _limits_groups(config) and _groups_matter(kind, config),
        ),
        (
            "it turns the two halves of a head (rope_interleave: false), and llama.cpp neighbouring pairs",
            kind in _LATENT and config.get("rope_interleave") is False,
        ),
        (
            "the shares of its chosen experts do not sum to one (norm_topk_prob: false), and llama.cpp scales them so",
            kind == "qwen3_moe" and config.get("norm_topk_prob") is False,
        ),
        (
            "its attention is cut into chunks (attention_chunk_size) of another size than 8192, which llama.cpp has in "
            "its code",
            kind == "llama4_text" and config.get("attention_chunk_size") not in (None, 8192),
        ),
    ):
        if there:
            raise ConfigError(
                f"no GGUF of this {kind}: {reason}, so that the file would be another model. Run the merged folder in "
                "transformers or vLLM"
            )
