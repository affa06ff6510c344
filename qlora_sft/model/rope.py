"""Refuses sequences that are longer than the positions of a model, or scales its positions as configured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_sft.config import Config, RopeScaling
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model.base import base_of, decoder_of
from qlora_sft.model.base_files import read_config, text_config
from qlora_sft.model.remote_code import runs_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qlora_sft.model.base import CausalModel


def check_context(config: Config, base: str) -> None:
    """Raises `ConfigError` if ``data.max_length`` exceeds the positions of the model, scaled as configured."""
    settings = text_config(read_config(base))
    positions = settings.get("max_position_embeddings")
    rope, wanted = config.model.rope_scaling, config.data.max_length
    if positions is None:
        return
    if rope is None and wanted > positions:
        raise ConfigError(
            f"data.max_length: {wanted:,} tokens, but {config.model.path} knows positions up to {positions:,}. Set "
            f"data.max_length={positions}, or scale its positions: model.rope_scaling.rope_type=yarn "
            f"model.rope_scaling.factor={_factor(wanted, positions)}"
        )
    if rope is not None:
        scaled = context_length(settings, rope)
        original = rope.original_max_position_embeddings or positions
        if wanted > scaled:
            raise ConfigError(
                f"data.max_length: {wanted:,} tokens, but model.rope_scaling.factor={rope.factor:g} makes {scaled:,} "
                f"positions of {original:,}; it takes a factor of {_factor(wanted, original)}"
            )


def _factor(wanted: int, positions: int) -> int:
    """Returns the smallest whole factor that makes ``wanted`` positions."""
    return -(-wanted // positions)


def context_length(settings: dict[str, Any], rope: RopeScaling) -> int:
    """Returns the positions of the scaled model; ``settings``: the text part of a config.json."""
    return int(rope.factor * (rope.original_max_position_embeddings or settings["max_position_embeddings"]))


def with_rope_scaling(config: dict[str, Any], rope: RopeScaling | None) -> dict[str, Any]:
    """Returns a config.json with the scaling, as transformers 5 spells it: all about positions in ``rope_parameters``.

    Models with a set of parameters per type of layer get it where attention is global; windows need no more positions.
    """
    if rope is None:
        return config
    text = dict(text_config(config))
    old = text.pop("rope_scaling", None) or {}
    parameters = dict(text.get("rope_parameters") or old)
    original = rope.original_max_position_embeddings or text["max_position_embeddings"]
    if "full_attention" in parameters:
        scaled = {**parameters, "full_attention": _scaled(parameters["full_attention"], text, rope, original)}
    else:
        scaled = _scaled(parameters, text, rope, original)
    text["rope_parameters"] = scaled
    if rope.rope_type != "dynamic":  # which counts from the original length on, and finds it under this name
        text["max_position_embeddings"] = context_length(text, rope)
    else:
        text["max_position_embeddings"] = original
    return {**config, "text_config": text} if config.get("text_config") else text


def _scaled(old: dict[str, Any], text: dict[str, Any], rope: RopeScaling, original: int) -> dict[str, Any]:
    """Returns one set of parameters with the scaling."""
    kept = {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if old.get(key) is not None}
    if "rope_theta" not in kept and text.get("rope_theta") is not None:
        kept["rope_theta"] = text["rope_theta"]
    new: dict[str, Any] = {**kept, "rope_type": rope.rope_type, "factor": float(rope.factor)}
    if rope.rope_type == "yarn":
        new["original_max_position_embeddings"] = original
        for name in ("attention_factor", "beta_fast", "beta_slow"):
            if getattr(rope, name) is not None:
                new[name] = getattr(rope, name)
    return new


def scaled_config(base: str, rope: RopeScaling | None, trust: bool = False) -> PretrainedConfig:
    """Returns transformers' configuration of ``base`` with the scaling; ``trust``: its own code may be run."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=runs_code(base, trust))
    if rope is None:
        return config
    return type(config).from_dict(with_rope_scaling(read_config(base), rope))


def check_rope(model: CausalModel, config: PretrainedConfig) -> None:
    """Raises `RunError` unless the loaded ``model`` turns its positions as ``config`` (from `scaled_config`) says."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = config.get_text_config()
    nested = "full_attention" in text.rope_parameters
    parameters = text.rope_parameters["full_attention"] if nested else text.rope_parameters
    layer_type = {"layer_type": "full_attention"} if nested else {}
    wanted, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](text, "cpu", **layer_type)
    base = base_of(model)
    rotary = getattr(decoder_of(base), "rotary_emb", None)
    prefix = "full_attention_" if nested else ""
    found = getattr(rotary, f"{prefix}inv_freq", None)
    found_scale = getattr(rotary, f"{prefix}attention_scaling", None)
    if found is None or found_scale != scale or not torch.allclose(found.float().cpu(), wanted.float(), rtol=1e-4):
        raise RunError(
            f"{type(base).__name__}: model.rope_scaling did not reach the model as it was loaded. Set "
            "model.backend=transformers, or leave model.rope_scaling out and shorten data.max_length."
        )
