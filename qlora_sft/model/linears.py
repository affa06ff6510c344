"""Chooses which linear layers of a model are quantised and which get adapters, by their place and their use.

Quantised are those of the language model, but not its output head. Adapted are those of its decoder layers. Both leave
out what routes to experts, what a layer reads the weight of without calling it, and other parts of a model (towers for
images and sound).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from qlora_sft.config import LoraConfig
from qlora_sft.errors import ConfigError
from qlora_sft.model.base import base_of, decoder_of, layer_list
from qlora_sft.model.experts import router_names, stacks
from qlora_sft.model.head import BLOCK

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

# Whose weight is read, or clamped in place, without the layer being called, in Mamba's first form and in Gemma 3n:
# packed in 4 bits it would be taken for numbers, and an adapter would have no effect.
READ_DIRECTLY = {"dt_proj": "Mamba", "prediction_coefs": "AltUp", "correction_coefs": "AltUp"}
# PEFT refuses adapters on these of its Mamba families, whose kernels for training read the weight.
REFUSED_BY_PEFT = {name: {"out_proj"} for name in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")}


def target_modules(model: CausalModel, lora: LoraConfig) -> list[str]:
    """Names of the layers that get adapters; ``all-linear``: every linear layer inside the blocks, not the head, and
    not those that route to experts.

    Raises `ConfigError` for a name that neither a layer nor a stack of experts has, or that cannot get one.
    """
    linear, barred = linear_names(model), barred_names(model)
    if lora.target_modules == "all-linear":
        routers = {name.rsplit(".", 1)[-1] for name in router_names(model)}
        chosen = sorted(linear - barred.keys() - routers)
        if not chosen:
            raise ConfigError(
                f"model.path: {type(base_of(model)).__name__} has no linear layers that could get adapters"
            )
        return chosen
    experts = {name for _, _, name in stacks(layer_list(model))}
    unknown = sorted(set(lora.target_modules) - linear - experts)
    if unknown:
        has = sorted(linear | experts)
        raise ConfigError(f"lora.target_modules: no linear layer is named {unknown}; this model has {has}")
    without = [f"{name} ({barred[name]})" for name in lora.target_modules if name in barred]
    if without:
        raise ConfigError(f"lora.target_modules: no adapter can be on {', '.join(without)}; remove it")
    return [name for name in lora.target_modules if name in linear]


def linear_names(model: CausalModel) -> set[str]:
    """Returns the last part of the names of all linear layers inside the decoder layers."""
    names = {name.rsplit(".", 1)[-1] for name, module in layer_list(model).named_modules() if is_linear(module)}
    # What has a number for a name, PEFT would take for every module with that number, whole decoder layers included.
    return {name for name in names if not name.isdigit()}


def is_linear(module: torch.nn.Module) -> bool:
    """Returns whether ``module`` multiplies and does nothing else; routers of experts may be linear layers that do."""
    if not isinstance(module, torch.nn.Linear):
        return False
    kind = type(module)
    return kind.forward is torch.nn.Linear.forward or kind.__name__ in ("FalconLinear", "Linear4bit")


def barred_names(model: CausalModel) -> dict[str, str]:
    """Returns the names that cannot get adapters, each with its reason."""
    kind = str(base_of(model).config.get_text_config().model_type)
    refused = REFUSED_BY_PEFT.get(kind, set())
    reasons = dict.fromkeys(read_directly(model), "its weight is read without calling the layer")
    reasons |= dict.fromkeys(refused, f"PEFT refuses it in {kind}")
    return {name: reason for name, reason in reasons.items() if name in linear_names(model)}


def read_directly(model: CausalModel) -> list[str]:
    """Returns the names of linear layers whose weight the module around them reads."""
    found = {
        name
        for parent in layer_list(model).modules()
        for name, _ in parent.named_children()
        if name in READ_DIRECTLY and READ_DIRECTLY[name] in type(parent).__name__
    }
    return sorted(found)


def peft_targets(model: CausalModel, names: list[str]) -> list[str] | str:
    """Returns ``names`` as PEFT has to be told them: a pattern where other parts of the model have such layers too."""
    prefix = layers_prefix(model)
    outside = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if is_linear(module) and not name.startswith(prefix)
    }
    if not outside & set(names):
        return names
    return rf"{re.escape(prefix)}(.*\.)?({'|'.join(map(re.escape, sorted(names)))})"


def layers_prefix(model: CausalModel) -> str:
    """Returns what the names of all parameters of the decoder layers begin with."""
    layers = layer_list(model)
    return str(next(name for name, module in model.named_modules() if module is layers)) + "."


def kept_in_full(model: CausalModel) -> list[str] | None:
    """Returns the modules that are not quantised, as bitsandbytes' settings name them; None: transformers' own choice,
    which is the output head.

    Towers for images and sound are left as they are: nothing trains them, and a merge keeps them. So are layers whose
    weight is read directly, or is no multiple of NF4's blocks wide.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    own = [*other_parts(model), *read_directly(model), *narrow(model)]
    return [*get_keys_to_not_convert(model), *own] if own else None


def narrow(model: CausalModel) -> list[str]:
    """Returns the linear layers whose input is no multiple of NF4's blocks: on a CPU bitsandbytes dequantises a block
    that goes on in the next row of a weight to other values than it was made from."""
    return [name for name, module in model.named_modules() if is_linear(module) and module.in_features % BLOCK]


def not_quantized(model: CausalModel) -> list[str]:
    """Returns the patterns of names that stay as they are when ``model`` is loaded in 4 bits."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = kept_in_full(model) or get_keys_to_not_convert(model)
    return [*kept, *router_names(model), *(model._keep_in_fp32_modules or ())]


def other_parts(model: CausalModel) -> list[str]:
    """Returns the names of the parts of ``model`` beside its language model: towers, and what leads from them to it."""
    decoder, head = decoder_of(model), model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is decoder).split(".")
    beside = []
    for depth in range(len(path)):
        parent = model.get_submodule(".".join(path[:depth]))
        for name, child in parent.named_children():
            if name != path[depth] and child is not head and any(True for _ in child.parameters()):
                beside.append(".".join([*path[:depth], name]))
    return beside


def describe_linears(model: CausalModel) -> str:
    """Says how many linear layers are in 4 bits and how many have adapters, and why others have none."""
    from bitsandbytes.nn import Linear4bit

    base = base_of(model)
    layers = [(name, m) for name, m in layer_list(base).named_modules() if is_linear(m)]
    layers = [(name, m) for name, m in layers if ".lora_" not in name]
    quantized = sum(isinstance(m, Linear4bit) for _, m in layers)
    adapted = sum(name.endswith(".base_layer") for name, _ in layers)
    without = [f"{name}: {reason}" for name, reason in barred_names(base).items()]
    other = other_parts(base)
    notes = [*without, *([f"{', '.join(other)}: frozen and not quantised"] if other else [])]
    told = f" ({'; '.join(notes)})" if notes else ""
    return f"of {len(layers)} linear layers {quantized} in NF4, {adapted} with LoRA{told}"
