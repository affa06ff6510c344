"""Gives the forms in which llama.cpp's converter may have written a weight, so that a file can be compared with it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qlora_sft.json_types import JsonObject


def arrangements(name: str, weight: np.ndarray, config: JsonObject) -> Iterator[np.ndarray]:
    """Yields the weight in every form in which the converter may have written it, the likeliest first.

    name: of the tensor in the model's files; config: the part of config.json that describes the language model.
    """
    for form in _elementwise(name, weight, config):
        yield form
        yield from _rotary_pairs(form, config)
        yield from _value_heads(name, form, config)


def _elementwise(name: str, weight: np.ndarray, config: JsonObject) -> Iterator[np.ndarray]:
    """Yields the weight as it is; 1 + norm (Gemma); the decay of a state that is stored as its logarithm (Mamba); the
    weight with the constants of Falcon-H1 in it."""
    yield weight
    made = [weight + 1] if weight.ndim == 1 else []
    if name.endswith("A_log"):
        made.append(-np.exp(weight))
    yield from made
    # Of a model in float16 the converter computes in that type, and writes the result in float32.
    yield from (each.astype(np.float16).astype(np.float32) for each in made)
    if config.get("model_type") == "falcon_h1":
        yield weight * _falcon_factors(name, len(weight), config).reshape(-1, *[1] * (weight.ndim - 1))


def _rotary_pairs(weight: np.ndarray, config: JsonObject) -> Iterator[np.ndarray]:
    """Yields the rows of each head in llama.cpp's rope order (query and key of Llama)."""
    heads = [config.get(key) for key in ("num_attention_heads", "num_key_value_heads")]
    for count in {each for each in heads if isinstance(each, int) and each}:
        if weight.ndim and len(weight) % (2 * count) == 0:
            pairs = weight.reshape(count, 2, len(weight) // count // 2, *weight.shape[1:])
            yield pairs.swapaxes(1, 2).reshape(weight.shape)


def _value_heads(name: str, weight: np.ndarray, config: JsonObject) -> Iterator[np.ndarray]:
    """Yields a part of a gated delta net whose value heads go around the key heads, where the files have those of one
    key head side by side."""
    keys, values = _number(config, "linear_num_key_heads"), _number(config, "linear_num_value_heads")
    if "linear_attn." not in name or not keys or keys == values:
        return
    size = 1 if name.endswith(("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight")) else 0
    size = size or _number(config, "linear_value_head_dim")
    # Query and key stand before the values.
    begin = 2 * keys * _number(config, "linear_key_head_dim") if "in_proj_qkv." in name or "conv1d" in name else 0
    across = name.endswith("out_proj.weight")
    rows = weight.T if across else weight
    if len(rows) - begin != values * size:
        return
    around = rows[begin:].reshape(keys, values // keys, size, *rows.shape[1:]).swapaxes(0, 1)
    whole = np.concatenate([rows[:begin], around.reshape(rows[begin:].shape)])
    yield whole.T if across else whole


def _falcon_factors(name: str, rows: int, config: JsonObject) -> np.ndarray:
    """Returns what the rows of a weight of Falcon-H1 are multiplied by in a file that has no place for it."""

    def of(key: str) -> float:
        found = config.get(key)
        return float(found) if isinstance(found, int | float) else 1.0

    def several(key: str, count: int) -> list[float]:
        found = config.get(key)
        return [float(each) for each in found] if isinstance(found, list) else [1.0] * count

    if ".mamba.in_proj." in name:
        inner, states = (
            _number(config, "mamba_d_ssm"),
            _number(config, "mamba_n_groups") * _number(config, "mamba_d_state"),
        )
        sizes = [inner, inner, states, states, rows - 2 * inner - 2 * states]
        factors = np.array(several("ssm_multipliers", 5)) * of("ssm_in_multiplier")
        return np.repeat(factors, sizes).astype(np.float32)
    gate, down = several("mlp_multipliers", 2)
    known = {
        "down_proj": down, "gate_proj": gate, "k_proj": of("key_multiplier") * of("attention_in_multiplier"),
        "q_proj": of("attention_in_multiplier"), "v_proj": of("attention_in_multiplier"),
        "o_proj": of("attention_out_multiplier"), "out_proj": of("ssm_out_multiplier"),
        "lm_head": of("lm_head_multiplier"), "embed_tokens": of("embedding_multiplier"),
    }  # fmt: skip
    factor = next((value for part, value in known.items() if f".{part}." in f".{name}"), 1.0)
    return np.full(rows, factor, dtype=np.float32)


def _number(config: JsonObject, key: str) -> int:
    found = config.get(key)
    return found if isinstance(found, int) else 0
