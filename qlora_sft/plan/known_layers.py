"""Knows the parts of a decoder layer for which `activations` has a formula, by their names and places."""

from __future__ import annotations

from collections import Counter

from qlora_sft.errors import ConfigError
from qlora_sft.model.mlp import NORM_AFTER
from qlora_sft.plan.blueprint import Blueprint, Norm

QKV = {"q_proj", "k_proj", "v_proj", "qkv_proj"}
OUT = {"o_proj"}
GATE_UP = {"gate_proj", "up_proj", "gate_up_proj"}
DOWN = {"down_proj"}
GATES: tuple[set[str], ...] = ({"gate_proj", "up_proj"}, {"gate_up_proj"})
# Norms by their place in a layer: of queries and keys, before attention, in the middle, behind the MLP.
QUERY_NORMS, KEY_NORMS = {"q_norm", "query_layernorm"}, {"k_norm", "key_layernorm"}
LAYER_NORMS = {
    "input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "pre_feedforward_layernorm",
    "post_mlp_layernorm", "post_norm1", "post_norm2", NORM_AFTER,
}  # fmt: skip
# Families whose router is known: the likeliest k of a softmax over all experts.
SOFTMAX_ROUTERS = {"qwen3_moe", "mixtral", "olmoe"}


def require_known(blueprint: Blueprint, number: int) -> None:
    """Raises `ConfigError` if decoder layer ``number`` has a part for which there is no formula."""
    linears = blueprint.layer(number)
    mixture = any(stack.block == number for stack in blueprint.stacks)
    odd = sorted({linear.short for linear in linears} - (QKV | OUT | GATE_UP | DOWN))
    odd += blueprint.stacked(number)
    odd += _odd_norms(blueprint.norms[number])
    odd += _unlike_llama(blueprint, number)
    dense = any(linear.short in DOWN for linear in linears)
    if mixture and (dense or blueprint.config.model_type not in SOFTMAX_ROUTERS):
        odd.append("experts beside a dense MLP" if dense else "this family's router")
    missing = not dense and not mixture
    if blueprint.dora:
        raise ConfigError("what layers with DoRA keep is known only when they are measured, at the beginning of a run")
    if odd or missing:
        raise ConfigError(f"{blueprint.kind}: what its layers keep is not known ({', '.join(odd) or 'no dense MLP'})")


def place_of(norm: Norm) -> str:
    """Returns where in the forward of its layer a norm stands, which decides whose input it shares."""
    short = norm.name.rsplit(".", 1)[-1]
    if short in QUERY_NORMS | KEY_NORMS:
        return "heads"
    if short == "input_layernorm":
        return "first"
    return "last" if short in (NORM_AFTER, "post_mlp_layernorm", "post_norm2") else "middle"


def _odd_norms(norms: list[Norm]) -> list[str]:
    """Returns the norms of another kind or in another place than those of the formula."""
    known = LAYER_NORMS | QUERY_NORMS | KEY_NORMS
    odd = {norm.kind for norm in norms if "RMSNorm" not in norm.kind}
    odd |= {norm.name for norm in norms if norm.name.rsplit(".", 1)[-1] not in known}
    # Norms without a weight are not among those that the blueprint lists.
    lacking = [] if any(place_of(norm) != "heads" for norm in norms) else ["norms without a weight"]
    return sorted(odd) + lacking


def _unlike_llama(blueprint: Blueprint, number: int) -> list[str]:
    """Returns what of the layer computes something else although its linear layers have Llama's names."""
    shorts = Counter(linear.short for linear in blueprint.layer(number))
    odd = sorted(f"{count} layers named {short}" for short, count in shorts.items() if count > 1)
    dense = any(short in DOWN for short in shorts)
    if dense and not any(gate == shorts.keys() & GATE_UP for gate in GATES):
        odd.append("an MLP without a gate")
    return odd + blueprint.loose(number)
